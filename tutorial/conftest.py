"""A lab's grader runs when it is named (pytest tutorial/NN_name/test_lab.py), not with all tests.

It grades what a learner has written, and an untouched starter has written nothing.
"""

collect_ignore_glob = ["*/test_lab.py"]

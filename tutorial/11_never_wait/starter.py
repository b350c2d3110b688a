"""Lab 11, the starter: copy it to mine.py and fill in the tasks.

    task 1, 4 points   Engine._steps_ahead: how far the device may run ahead
    task 2, 6 points   Engine._run_ahead: let it, and take its tokens

    python tutorial/grade.py --lab 11
    python tutorial/run_mine.py --lab 11 --prompt "ROMEO:"

All else is the engine's own code: tutorial/labs.py cut it out of nanopaged.py.
"""

import nanopaged


class Engine(nanopaged.Engine):
    """Scheduler, model and sampler, joined in step(); the caches are the memory of its pools."""

    def _steps_ahead(self, seqs):
        """How many tokens the device may draw for all before the host looks: 16, 8, 4, 2, or 1.

        1 if the host must see each: for prompts, beams, log-probabilities and penalties. Else as
        many as somebody wants, none passes the model's longest text with, and there are blocks for.
        """
        raise NotImplementedError("Lab 11, task 1: how far the device may run ahead")

    def _run_ahead(self, seqs, num_steps):
        """Let the device draw num_steps tokens for each sequence -> the groups that got them.

        It does not wait for the host, which learns the tokens of one step while later steps run,
        and drops what comes behind the end of a text.
        """
        raise NotImplementedError("Lab 11, task 2: let it, and take its tokens")

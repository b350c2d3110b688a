"""Lab 11, the starter: copy it to mine.py and fill in the tasks.

    task 1, 4 points   Engine._steps_ahead: how far the device may run ahead
    task 2, 6 points   Engine._launch and Engine._land: let it fly, and take its tokens

    python tutorial/grade.py --lab 11
    python tutorial/run_mine.py --lab 11 --prompt "ROMEO:"

All else is the engine's own code: tutorial/labs.py cut it out of nanopaged.py.
"""

import nanopaged


class Engine(nanopaged.Engine):
    """Scheduler, model and sampler, joined in step(); the caches are the memory of its pools."""

    def _steps_ahead(self, seqs, in_flight=0):
        """How many tokens the device may draw for all before the host looks: 16, 8, 4, 2, or 0.

        0 if the host must see each: for prompts, beams, log-probabilities and penalties. Else as
        many as somebody wants beside those in flight, and as fit into max_model_len and the pool.
        """
        raise NotImplementedError("Lab 11, task 1: how far the device may run ahead")

    def _launch(self, seqs, in_flight=0):
        """Launch a flight for `seqs`; in_flight: tokens of each that are in the air already.

        Left out is who has ended or was aborted, or will be complete with those. -> its sequences,
        the number of tokens of each, and the tokens to come, for which _land() waits. Or None, if
        the host must look first; behind a flight also if somebody waits for whom there is a seat.
        """
        raise NotImplementedError("Lab 11, task 2: let it fly, and take its tokens")

    def _land(self, seqs, num_steps, steps, landed):
        """Take the tokens of a flight, up to the end of each text -> the groups that got them."""
        raise NotImplementedError("Lab 11, task 2: let it fly, and take its tokens")

"""In place of CUDA graphs, on a CPU: what a replay does is done by the model itself, and counted.

    graphs.load(batch)              kernels.DecodeGraphs: fixed memory, padded
    graphs.loaded.graph.replay()    here: rows that are no padding, then a draw

All else, such as what is put where before and after a replay, is the engine's own code.
"""

import sys
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from nanopaged import kernels, torch  # noqa: E402


class Landed:
    """In place of a CUDA stream and its event: a copy that is there at once."""

    def record_event(self):
        return self

    def synchronize(self):
        pass


class Replay:
    """A captured graph, played by the model itself: a step of all rows that are no padding."""

    def __init__(self, owner, engine, size):
        self.owner, self.model, self.kv_cache = owner, engine.model, engine.kv_cache
        num_columns = -(-engine.max_model_len // engine.pool.block_size)
        self.memory = self.flat_batch([([0], 0, [0] * num_columns, True)] * size)
        self.memory.seeds = torch.zeros(size, dtype=torch.int64)
        self.memory.options = torch.zeros(size, 4, dtype=torch.float64)
        self.memory.past = torch.zeros(2, size, 16, dtype=torch.float64)
        self.memory.logits = torch.zeros(size, engine.model.config.vocab_size)
        self.memory.graph = self

    def flat_batch(self, rows):
        return kernels.flat_batch(rows, self.kv_cache.shape[3], self.kv_cache.device)

    def replay(self):
        m = self.memory
        alive = m.context_lens > 0
        rows = [([token_id], length - 1, table, True) for token_id, length, table in zip(
            m.input_ids.tolist(), m.context_lens.tolist(), m.block_tables.tolist(), strict=True)]
        rows = rows[:alive.sum()]                  # padding stands behind
        assert m.block_tables[len(rows):, 0].lt(0).all(), "padding has a slot, and would be written"
        m.logits.fill_(torch.nan)                  # nobody shall read what padding gets
        m.logits[:len(rows)] = self.model(self.flat_batch(rows), self.kv_cache)
        m.context_lens += alive
        drawn = kernels.draw_reference(m.logits, False, m.seeds, m.context_lens, m.options)
        m.past.copy_(torch.cat((m.past[..., 1:], drawn[..., None]), dim=2))
        m.input_ids.copy_(drawn[0])
        self.owner.num_replays += 1


class StandIn(kernels.DecodeGraphs):
    """DecodeGraphs on a CPU: what is played is the replay; all else is the engine's own code."""

    draw = staticmethod(kernels.draw_reference)    # not compiled

    def __init__(self, engine):
        self.model = engine.model
        self.num_replays = self.num_ahead = 0      # replays; tokens that were drawn ahead
        self.graphs = {size: Replay(self, engine, size).memory for size in (1, 2, 4, 8, 16)}

    def run_ahead(self, num_steps):
        self.num_ahead += num_steps * len(self.loaded.cuts)
        with mock.patch.object(torch.cuda, "current_stream", Landed):
            steps, landed = super().run_ahead(num_steps)
        return steps.clone(), landed               # of memory that the next flight writes to

"""Publishing while training goes on: a snapshot of a round is sent from a thread, so a push cannot stop a run."""

import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from transformers import TrainerCallback

from .hub import publish
from .recipe import HubSection

if TYPE_CHECKING:
    from .trainer import DecentralizedMixin


class PushCallback(TrainerCallback):
    """Publishes every `hub.every_rounds` rounds but the last, which is published when the run folder is complete."""

    def __init__(self, trainer: "DecentralizedMixin", hub: HubSection, say: Callable[[str], None]):
        assert hub.repo_id is not None
        assert hub.every_rounds is not None
        self.trainer, self.hub, self.say = trainer, hub, say
        self.run = Path(trainer.args.output_dir)
        self.snapshots = self.run / ".publishing"
        self.thread = ThreadPoolExecutor(max_workers=1)
        self.push: Future[None] | None = None  # the one that is under way or was last

    def on_step_end(self, args, state, control, **kwargs):
        if not control.should_evaluate:  # else the round's scores are still to come
            self._push(args, state)

    def on_evaluate(self, args, state, control, **kwargs):
        self._push(args, state)

    def _push(self, args, state) -> None:
        if state.global_step % (args.local_steps * self.hub.every_rounds) or state.global_step >= state.max_steps:
            return
        round_index = state.global_step // args.local_steps
        snapshot = self.snapshots / f"round-{round_index}"
        self.trainer.save_model(str(snapshot))  # every process hands over its agents, whether or not a push follows
        if not self.trainer.decaf_processes.is_main:
            return
        if self.push is not None and not self.push.done():
            self.say(f"round {round_index} is not published: the push of an earlier round still goes on")
            shutil.rmtree(snapshot)
            return
        for name in ("recipe.yaml", "partition.json", "metrics.jsonl"):
            shutil.copyfile(self.run / name, snapshot / name)
        self.push = self.thread.submit(self._publish, snapshot, round_index)

    def finish(self) -> None:
        """Wait for the push that is under way and remove the snapshots."""
        self.thread.shutdown(wait=True)
        shutil.rmtree(self.snapshots, ignore_errors=True)

    def _publish(self, snapshot: Path, round_index: int) -> None:
        try:
            address = publish(snapshot, self.hub)[0]
            self.say(f"round {round_index} is published: {address}")
        except Exception as error:  # whatever it is, the training goes on
            self.say(f"round {round_index} is not published: {error}; training goes on")

"""What a run shows while it trains: a bar that counts rounds, or plain lines where there is no terminal."""

import sys

from tqdm.auto import tqdm


class Progress:
    """Counts rounds and shows loss, consensus distance and the last accuracy."""

    def __init__(self, rounds: int, done: int, *, bar: bool):
        self.rounds = rounds
        self.accuracy = ""
        self.every = max(1, rounds // 20)  # about twenty lines, however long the run
        self.bar = tqdm(total=rounds, initial=done, unit="round", leave=False) if bar and sys.stderr.isatty() else None

    def show(self, line: dict) -> None:
        """Show one line of metrics.jsonl."""
        if "eval" in line:
            scores = {name: value for name, value in line["eval"]["consensus"].items() if not name.endswith("loss")}
            name = next(iter(scores), None)
            if name is not None:
                mean = line["eval"]["agents_mean"][name]
                self.accuracy = f", {name} {scores[name]:.3f} (agents' mean {mean:.3f})"
        text = f"loss {line['loss']:.3f}, consensus distance {line['consensus_distance']:.3f}"
        if self.bar is not None:  # there the score of the last evaluation stays in sight
            self.bar.set_postfix_str(text + self.accuracy, refresh=False)
            self.bar.update(1)
        elif line["round"] % self.every == 0 or "eval" in line:
            seconds = line["train_seconds"] + line["mix_seconds"]
            measured = self.accuracy if "eval" in line else ""
            print(f"round {line['round']}/{self.rounds}: {text}{measured}, {seconds:.1f} s", flush=True)

    def close(self) -> None:
        """Remove the bar."""
        if self.bar is not None:
            self.bar.close()

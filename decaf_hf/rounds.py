"""A consensus round: which adapters a process holds, how they mix along the graph, what is measured and logged."""

import hashlib
import json
import math
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import networkx as nx
import torch
from peft import PeftModel
from torch import Tensor
from transformers import TrainerCallback

from . import algorithms, exchange, optimizer_state, robust
from .adapters import CONSENSUS, agent_name, as_adapter, as_tensors, experts, pair_names, scalings, trainable, write
from .errors import DecafError
from .exchange import Processes
from .files import append_line, parse_json, read_plain, write_text
from .mixing import Faults, MixingSchedule, neighbors, without_links
from .progress import Progress

if TYPE_CHECKING:
    from .trainer import DecentralizedMixin

MIB = 2**20
STAMP = 8  # bytes that open each payload; not counted as payload


class Layout(NamedTuple):
    """What an agent's adapter looks like, known in every process."""

    like: dict[str, Tensor]  # by name, without values
    scaling: dict[str, float]
    stacks: dict[str, int]  # adapters.experts

    def size(self, names: Sequence[str] | None = None) -> int:
        """Bytes of the named tensors, or of all."""
        tensors = self.like.values() if names is None else [self.like[name] for name in names]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def digest(self, names: Sequence[str]) -> str:
        """Equal for equal names, shapes and dtypes."""
        looks = [(name, tuple(self.like[name].shape), str(self.like[name].dtype)) for name in names]
        return hashlib.blake2b(repr(looks).encode()).hexdigest()


class Exchanged(NamedTuple):
    """What one hosted agent mixed in a hop, and what it sent."""

    agent: int
    senders: list[algorithms.Adapter]  # as they arrived, its own among them; kept of a round's first hop only
    weights: list[float]
    truncation: float
    payload_bytes: int
    rotations: dict[str, Tensor]  # algorithms.rotations of its factors; empty unless asked for
    kept: dict[int, float]  # by neighbor, the share of its weight that was taken: robust.shares, or 0 if refused


class Network:
    """The hosted agents' adapters and their exchange with the others."""

    def __init__(
        self,
        model: PeftModel,
        processes: Processes,
        num_agents: int,
        algorithm: str,
        schedule: MixingSchedule,
        *,
        split: str,
        align: bool,
        ranks: Sequence[int] | None,
        optimizer_state: str,
        gossip_steps: int,
        faults: Faults,
        robust: str,
    ):
        self.processes = processes
        self.num_agents = num_agents
        self.algorithm = algorithm
        self.schedule = schedule
        self.options = {"split": split, "align": align}
        by_product = algorithms.ALGORITHMS[algorithm].mix is algorithms.average_products
        self.optimizer_state = optimizer_state if by_product else "kept"  # the other rules leave the basis as it is
        self.gossip_steps = gossip_steps
        self.faults = faults
        self.robust = robust
        self.agents = list(processes.agents(num_agents))
        self.parameters: dict[int, dict[str, Tensor]] = {
            agent: trainable(model, agent_name(agent)) for agent in self.agents
        }
        ranks = [None] * num_agents if ranks is None else ranks
        hosted = {ranks[agent]: _layout(model, agent_name(agent)) for agent in self.agents}
        known = {r: layout for part in exchange.gather_objects(processes, hosted) for r, layout in part.items()}
        self.gone = {agent for agent in range(num_agents) if processes.host(agent, num_agents) is None}
        self._check_connected()
        anyone = next(iter(known.values()))
        self.layouts = [known.get(ranks[agent], anyone) for agent in range(num_agents)]
        self._consensus = _layout(model, CONSENSUS)
        like = self.parameters[self.agents[0]]
        stays = {a for a, _ in pair_names(like).values()} if algorithms.ALGORITHMS[algorithm].freezes_a else set()
        self.travels = [name for name in like if name not in stays]
        self._looks = [layout.digest(self.travels) for layout in self.layouts]

    def check_finite(self, when: str) -> None:
        """Raise `DecafError` naming the first hosted agent whose adapter is not finite, before it reaches others."""
        for agent, own in self.parameters.items():
            for name, parameter in own.items():
                if not bool(torch.isfinite(parameter).all()):
                    raise DecafError(
                        f"agent {agent}: {name} is not finite after {when}; lower learning_rate or set "
                        "max_grad_norm; nothing of this round was mixed or saved"
                    )

    def mix(self, round_index: int) -> list[Exchanged]:
        """Exchange and mix `gossip_steps` times.

        Hops are counted through all rounds, from 1, and hop h uses the schedule's matrix h: a topology that changes
        goes on where the last round left it, also after a resume.
        """
        if algorithms.ALGORITHMS[self.algorithm].mix is None:
            return []
        done = []
        for hop, matrix in enumerate(self.matrices(round_index)):
            if hop:
                check = partial(self.check_finite, f"hop {hop} of round {round_index}")
                exchange.together(self.processes, check)
            exchanged = self._hop(f"{round_index}.{hop}", matrix)
            done += exchanged if hop == 0 else [e._replace(senders=[]) for e in exchanged]
        return done

    def matrices(self, round_index: int) -> list[Tensor]:
        """The `(N, N)` mixing matrix of each hop of a round, without the links that are down in it."""
        before = (round_index - 1) * self.gossip_steps
        whole = [self.schedule.matrix(hop) for hop in range(before + 1, before + self.gossip_steps + 1)]
        if not self.faults and not self.gone:
            return whole
        down = self.faults.down(self.num_agents, round_index)
        for agent in self.gone:
            down[agent] = down[:, agent] = True
        return [without_links(matrix, down) for matrix in whole]

    def _check_connected(self) -> None:
        """Raise `DecafError` naming the pieces that the graph falls into without the agents that are gone."""
        if not self.gone or algorithms.ALGORITHMS[self.algorithm].mix is None:
            return
        hops = self.schedule.period or 1
        graph = nx.Graph()
        for hop in range(1, hops + 1):
            graph.add_edges_from((i, j) for i, others in enumerate(self.schedule.neighbors(hop)) for j in others)
        graph.remove_nodes_from(self.gone)
        graph.add_nodes_from(set(range(self.num_agents)) - self.gone)
        pieces = [sorted(piece) for piece in nx.connected_components(graph)]
        if len(pieces) > 1 and self.schedule.period is not None:
            raise DecafError(
                f"without agents {sorted(self.gone)} the graph {self.schedule.topology} falls into "
                f"{' and '.join(map(str, pieces))}, which cannot reach each other; bring them back"
            )

    def links_down(self, round_index: int) -> float:
        """The share of a round's links that are down in it, all hops together."""
        schedule, steps = self.schedule, self.gossip_steps
        whole = sum(map(len, (n for k in range(steps) for n in schedule.neighbors((round_index - 1) * steps + k + 1))))
        left = sum(map(len, (n for matrix in self.matrices(round_index) for n in neighbors(matrix))))
        return 1 - left / whole if whole else 0.0

    @torch.no_grad()
    def _hop(self, hop: str, matrix: Tensor) -> list[Exchanged]:
        """One exchange along the edges of a matrix and one mix; an agent without neighbors keeps its adapter."""
        rule = algorithms.ALGORITHMS[self.algorithm].mix
        around = neighbors(matrix)
        own = {
            agent: torch.cat([self._stamp(agent, hop), exchange.pack([tensors[name] for name in self.travels])])
            for agent, tensors in self.parameters.items()
        }
        sizes = [STAMP + layout.size(self.travels) for layout in self.layouts]
        received = exchange.exchange(self.processes, own, around, sizes)
        mine = {agent: self._adapter(agent, buffer[STAMP:]) for agent, buffer in own.items()}
        theirs = {
            agent: mine[agent] if agent in own and buffer is own[agent] else self._open(agent, hop, buffer)
            for agent, buffer in received.items()
        }
        done = []
        for agent in self.agents:
            if around[agent]:
                kept = self._kept(mine[agent], {other: theirs[other] for other in sorted(around[agent])})
                weights = {other: matrix[agent, other].item() * share for other, share in kept.items() if share > 0}
                lost = sum(matrix[agent, other].item() * (1 - share) for other, share in kept.items())
                weights[agent] = matrix[agent, agent].item() + lost
                senders = [mine[agent] if sender == agent else theirs[sender] for sender in sorted(weights)]
                weights = [weights[sender] for sender in sorted(weights)]
                mixed = rule(mine[agent], senders, weights, **self.options)
                # Adapters that others still need are the received copies, so writing at once disturbs nobody.
                write(self.parameters[agent], as_tensors(mixed.adapter, self.parameters[agent]))
                sent = self.layouts[agent].size(self.travels) * len(around[agent])
                turned = self.optimizer_state == "rotated"
                rotations = algorithms.rotations(mine[agent], mixed.adapter) if turned else {}
                done.append(Exchanged(agent, senders, weights, mixed.truncation, sent, rotations, kept))
        return done

    def _kept(self, own: algorithms.Adapter, around: Mapping[int, algorithms.Adapter | None]) -> dict[int, float]:
        """The share of its weight that each neighbor keeps: 0 for one whose payload cannot be right."""
        usable = {agent: adapter for agent, adapter in around.items() if adapter is not None}
        shares = robust.shares(self.robust, own, list(usable.values()))
        return {**dict.fromkeys(around, 0.0), **dict(zip(usable, shares, strict=True))}

    def _stamp(self, agent: int, hop: str) -> Tensor:
        """The first bytes of a payload: whose it is, which hop's, and of which names, shapes and dtypes."""
        text = repr((agent, hop, self._looks[agent])).encode()
        device = next(iter(self.parameters[self.agents[0]].values())).device
        return torch.tensor(list(hashlib.blake2b(text, digest_size=STAMP).digest()), dtype=torch.uint8, device=device)

    def _open(self, agent: int, hop: str, buffer: Tensor) -> algorithms.Adapter | None:
        """The adapter in a payload; None if its stamp is another or its numbers are of no use."""
        if not torch.equal(buffer[:STAMP], self._stamp(agent, hop)):
            return None
        adapter = self._adapter(agent, buffer[STAMP:])
        return adapter if robust.is_usable(adapter) else None

    def carry_over(self, optimizer: torch.optim.Optimizer, done: list[Exchanged]) -> None:
        """Let the optimizer's state of the agents that mixed follow their factors into the new basis, as asked."""
        for exchanged in done:
            own = self.parameters[exchanged.agent]
            if self.optimizer_state == "reset":
                optimizer_state.reset(optimizer, own)
            elif self.optimizer_state == "rotated":
                optimizer_state.turn(optimizer, own, exchanged.rotations)

    def measure(self, done: list[Exchanged]) -> dict[str, float]:
        """Means over the hosted agents of what their exchange showed; an agent that did not mix counts with zero.

        Interference is the first hop's: what local training brought apart. Truncations of several hops add up as
        independent errors do, by the root of the sum of their squares; payloads by their sum.
        """
        count = len(self.agents)
        truncation = [math.hypot(*(e.truncation for e in done if e.agent == agent)) for agent in self.agents]
        return {
            "interference": sum(algorithms.interference(e.senders, e.weights) for e in done if e.senders) / count,
            "truncation": sum(truncation) / count,
            "payload_mib": sum(e.payload_bytes for e in done) / count / MIB,
        }

    def gather(self, *, everywhere: bool = False) -> dict[int, dict[str, Tensor]]:
        """All agents' adapters at process 0 (or everywhere) for measuring and saving; empty at the other processes."""
        own = {agent: exchange.pack(list(tensors.values())) for agent, tensors in self.parameters.items()}
        sizes = [layout.size() for layout in self.layouts]
        everyone = exchange.gather(self.processes, own, sizes, everywhere=everywhere)
        return {agent: exchange.unpack(buffer, self.layouts[agent].like) for agent, buffer in everyone.items()}

    @torch.no_grad()
    def consensus(self, everyone: Mapping[int, Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """The network's mean adapter by the algorithm's own rule with equal weights."""
        mean = algorithms.consensus(self.algorithm, self._adapters(everyone), **self.options)
        return as_tensors(mean, next(iter(everyone.values())))

    def mean(self, everyone: Mapping[int, Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """`consensus` of what `gather` gave process 0, in every process; all call it."""
        like = self._consensus.like
        own = None
        if everyone:
            mean = self.consensus(everyone)
            own = exchange.pack([mean[name].to(tensor.dtype) for name, tensor in like.items()])
        return exchange.unpack(exchange.spread(self.processes, own, self._consensus.size()), like)

    @torch.no_grad()
    def consensus_distance(self, everyone: Mapping[int, Mapping[str, Tensor]]) -> float:
        """How far the agents' updates are from their mean (algorithms.consensus_distance)."""
        return algorithms.consensus_distance(self._adapters(everyone))

    def _adapters(self, everyone: Mapping[int, Mapping[str, Tensor]]) -> list[algorithms.Adapter]:
        layouts = self.layouts
        return [
            as_adapter(everyone[agent], layouts[agent].scaling, layouts[agent].stacks) for agent in sorted(everyone)
        ]

    def _adapter(self, agent: int, buffer: Tensor) -> algorithms.Adapter:
        layout, own = self.layouts[agent], self.parameters[self.agents[0]]
        tensors = exchange.unpack(buffer, {name: layout.like[name] for name in self.travels})
        # What did not travel is common to all agents (the frozen A of dlora-fa).
        tensors = {name: tensors.get(name, own[name]) for name in own}
        return as_adapter(tensors, layout.scaling, layout.stacks)


def _layout(model: PeftModel, name: str) -> Layout:
    like = {key: torch.empty_like(tensor, device="meta") for key, tensor in trainable(model, name).items()}
    return Layout(like, scalings(model, name), experts(model, name))


class RoundCallback(TrainerCallback):
    """Runs a round after every `local_steps` optimizer steps; the round's number is arithmetic, not memory."""

    def __init__(self, trainer: "DecentralizedMixin"):
        self.trainer = trainer
        self.network: Network = trainer.decaf_network
        self.metrics = Path(trainer.args.output_dir) / "metrics.jsonl"
        self.pending: dict | None = None  # the round's line, kept back until its evaluation is in
        self.progress: Progress | None = None
        self.checkpoints = {"checkpoints": 0, "checkpoint_seconds": 0.0, "checkpoint_mib": 0.0}
        self._resumed: list[dict] = []  # the lines that the checkpoint holds
        self._trained = 0.0  # seconds that the round in progress has trained before it was saved

    def start_anew(self) -> None:
        """Forget the rounds of an earlier training."""
        self.pending, self._resumed, self._trained = None, [], 0.0
        self.checkpoints = {"checkpoints": 0, "checkpoint_seconds": 0.0, "checkpoint_mib": 0.0}

    def resume(self, lines: list[dict], progress: Mapping[str, float]) -> None:
        """Go on from a checkpoint: its lines of `metrics.jsonl` and what `progress_so_far` was."""
        self._resumed, self._trained = lines, progress["train_seconds"]
        self.checkpoints = {name: progress[name] for name in self.checkpoints}

    def progress_so_far(self) -> dict[str, float]:
        """What a checkpoint holds to go on counting from; called when one is written."""
        inside = self.trainer.state.global_step % self.trainer.args.local_steps
        self._trained = self._trained + self._now() - self.started if inside else 0.0
        return {"train_seconds": self._trained, **self.checkpoints}

    def count_checkpoint(self, seconds: float, size: int) -> None:
        """Add what a checkpoint cost; the bytes are all processes' in process 0, its own in others."""
        cost = {"checkpoints": 1, "checkpoint_seconds": seconds, "checkpoint_mib": size / MIB}
        self.checkpoints = {name: value + cost[name] for name, value in self.checkpoints.items()}

    def restore_metrics(self) -> None:
        """Let `metrics.jsonl` hold the lines of the checkpoint that is resumed, none of a new run."""
        write_text(self.metrics, "".join(json.dumps(line) + "\n" for line in self._resumed))

    def on_train_begin(self, args, state, control, **kwargs):
        rounds_done = state.global_step // args.local_steps
        if self.network.processes.is_main:
            self.restore_metrics()
            self.progress = Progress(state.max_steps // args.local_steps, rounds_done, bar=not args.disable_tqdm)
        self.started = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        stopping = self.trainer.decaf_stopping
        if state.global_step % args.local_steps:
            if self.network.processes.count == 1 and stopping.signal is not None:
                control.should_save = control.should_training_stop = True
            return
        round_index = state.global_step // args.local_steps
        trained = self._now()
        exchange.together(self.network.processes, lambda: self.network.check_finite(f"step {state.global_step}"))
        done = self.network.mix(round_index)
        self.network.carry_over(self.trainer.optimizer, done)
        mixed = self._now()
        own = {"loss": self.trainer.decaf_mean_loss(), **self.network.measure(done)}
        refused = [(e.agent, other, share) for e in done for other, share in e.kept.items() if share < 1]
        everyone = self.network.gather()
        mine = (len(self.network.agents), own, refused, stopping.signal)
        parts = exchange.gather_objects(self.network.processes, mine)
        if self.network.processes.is_main:
            total = sum(count for count, *_ in parts)
            mean = {name: sum(count * part[name] for count, part, *_ in parts) / total for name in own}
            distance = self.network.consensus_distance(everyone)
            self.pending = {
                "round": round_index,
                "step": state.global_step,
                "loss": mean["loss"],
                "learning_rate": self.trainer.lr_scheduler.get_last_lr()[0],
                "consensus_distance": distance,
                "interference": mean["interference"],
                "truncation": mean["truncation"],
                "payload_mib": mean["payload_mib"],
                "train_seconds": self._trained + trained - self.started,
                "mix_seconds": mixed - trained,
                "measure_seconds": self._now() - mixed,
            }
            if self.network.faults:
                self.pending["links_down"] = self.network.links_down(round_index)
            self.trainer.log({key: value for key, value in self.pending.items() if key != "step"})
            refused = sorted(entry for _, _, part, _ in parts for entry in part)
            if refused:
                self.pending["refused"] = refused
        signals = [number for *_, number in parts if number is not None]
        if signals and state.global_step < state.max_steps:  # one process was told, so all stop here
            stopping.signal = signals[0]
            control.should_save = control.should_training_stop = True
        if state.global_step >= state.max_steps and self.trainer.eval_dataset is not None:
            control.should_evaluate = True
        if not control.should_evaluate:
            self._write()
        self._trained, self.started = 0.0, self._now()

    def on_evaluate(self, args, state, control, **kwargs):
        if self.pending is not None:
            self.pending["eval"] = self.trainer.decaf_evaluation
            self._write()
        self.started = self._now()  # evaluating is no part of the next round's training time

    def on_save(self, args, state, control, **kwargs):
        self.started = self._now()

    def on_train_end(self, args, state, control, **kwargs):
        if self.progress is not None:
            self.progress.close()

    def _write(self) -> None:
        if self.pending is not None:
            append_line(self.metrics, json.dumps(self.pending))
            self.progress.show(self.pending)
            self.pending = None

    def _now(self) -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # otherwise the clock would read launches, not work
        return time.perf_counter()


def read_metrics(path: Path) -> list[dict]:
    """The lines of `metrics.jsonl`, one per round, up to one that is none: a crash may cut the last one short."""
    lines = []
    try:
        content = read_plain(path).decode("utf-8") if path.exists() else ""
    except OSError as error:
        raise DecafError(f"{path}: cannot be read ({error.strerror}); remove it, or run the recipe again") from None
    except UnicodeDecodeError as error:
        raise DecafError(f"{path} is damaged ({error}); run the recipe again") from None
    for text in content.split("\n"):
        try:
            line = parse_json(text, finite=False)
        except ValueError:
            break
        if not isinstance(line, dict):
            break
        lines.append(line)
    return lines

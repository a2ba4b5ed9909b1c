"""Reinforcement learning in miniature: one trainer, two samplers, and weight updates between them.

The policy reads four digits and writes four: it is rewarded for each that is one more than the one it read
(9 becomes 0). Samplers generate in bfloat16 with the weights that they last received; the trainer learns by
GRPO (group-relative policy optimization, Shao et al. 2024) in float32 from what they write. Start it so::

    torchrun --nproc-per-node 3 examples/grpo.py                      # one trainer, two samplers
    torchrun --nproc-per-node 3 examples/grpo.py --weights whole      # all weights, every time, to compare

Updates are lossless, so both print the same rewards, to the last digit.
"""

import argparse
import json

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import one_hot

import distcomp
from distcomp import calls, updates

DIGITS, LENGTH = 10, 4
WIDTH = 256
TRAINER = 0


def options(arguments=None):
    shown = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], formatter_class=shown)
    parser.add_argument("--weights", default="updates", choices=["updates", "whole"], help="what is sent")
    parser.add_argument("--steps", type=int, default=200, help="of training")
    parser.add_argument("--prompts", type=int, default=16, help="per sampler and step")
    parser.add_argument("--group", type=int, default=8, help="answers to each prompt")
    parser.add_argument("--lr", type=float, default=1e-3, help="learning rate of AdamW")
    parser.add_argument("--key-every", type=int, default=64, help="versions from one key frame to the next")
    parser.add_argument("--seed", type=int, default=0, help="of weights, prompts and answers")
    return parser.parse_args(arguments)


class Policy(nn.Module):
    """Scores for the next digit, given the digits read, those written so far, and the place."""

    def __init__(self):
        super().__init__()
        read_and_written = 2 * LENGTH * DIGITS + LENGTH
        self.layers = nn.Sequential(
            nn.Linear(read_and_written, WIDTH),
            nn.GELU(),
            nn.Linear(WIDTH, WIDTH),
            nn.GELU(),
            nn.Linear(WIDTH, DIGITS),
        )

    def forward(self, prompts, answers, place):
        """``prompts``, ``answers``: ``[n, 4]`` digits, of which ``place`` are written."""
        dtype = self.layers[0].weight.dtype
        written = one_hot(answers, DIGITS).to(dtype)
        written[:, place:] = 0
        here = one_hot(torch.full((len(prompts),), place), LENGTH).to(dtype)
        parts = [one_hot(prompts, DIGITS).to(dtype).flatten(1), written.flatten(1), here]
        return self.layers(torch.cat(parts, dim=1)).float()


def log_probabilities(policy, prompts, answers):
    """Of each digit of the answers: ``[n, 4]``."""
    scores = [policy(prompts, answers, place).log_softmax(-1) for place in range(LENGTH)]
    return torch.stack(scores, dim=1).gather(2, answers[:, :, None])[:, :, 0]


@torch.no_grad()
def sample(policy, wanted, draw):
    """Prompts, each as often as the group is large, answers, and how likely each digit was."""
    prompts = torch.randint(DIGITS, (wanted.prompts, LENGTH), generator=draw).repeat_interleave(
        wanted.group, 0
    )
    answers = torch.zeros_like(prompts)
    for place in range(LENGTH):
        chances = policy(prompts, answers, place).softmax(-1)
        answers[:, place] = torch.multinomial(chances, 1, generator=draw)[:, 0]
    return prompts, answers, log_probabilities(policy, prompts, answers)


def reward(prompts, answers):
    """The share of digits that are one more than the one read."""
    return (answers == (prompts + 1) % DIGITS).float().mean(1)


def grpo_loss(policy, rollouts, wanted):
    """A clipped policy gradient; a reward counts by how far it is from those of its group."""
    prompts, answers, drawn_with = rollouts
    rewards = reward(prompts, answers).view(-1, wanted.group)
    advantages = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)
    advantages = advantages.view(-1, 1)
    ratio = (log_probabilities(policy, prompts, answers) - drawn_with).exp()
    return -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages).mean()


def gathered_rollouts(rollouts):
    """Those of all samplers, in order of rank; the trainer's own, which are empty of meaning, left out."""
    everyone = []
    for tensor in rollouts:
        into = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
        calls.all_gather(into, tensor.contiguous())
        everyone.append(torch.cat([each for rank, each in enumerate(into) if rank != TRAINER]))
    return everyone


class WholeWeights:
    """What updates replace: every weight, in every step."""

    def __init__(self, state):
        self.state, self.sent_bytes = state, 0

    def publish(self, state):
        for _, tensor in sorted(state.items()):
            calls.broadcast(tensor, TRAINER)
            self.sent_bytes += tensor.nbytes

    def receive(self):
        for _, tensor in sorted(self.state.items()):
            calls.broadcast(tensor, TRAINER)


class WeightUpdates:
    """The difference from the version before."""

    def __init__(self, state, key_every, trains):
        self.sent_bytes = 0
        self.publisher = updates.Publisher(state, key_every=key_every) if trains else None
        self.receiver = None if trains else updates.Receiver(state, number=None)

    def publish(self, state):
        self.sent_bytes += updates.publish_to_group(self.publisher, state).nbytes

    def receive(self):
        updates.receive_from_group(self.receiver)


def train(wanted):
    """Train or sample; what came of it, on the trainer."""
    rank = dist.get_rank()
    trains = rank == TRAINER
    torch.manual_seed(
        wanted.seed if trains else 1000 + rank
    )  # samplers know nothing of the trainer's weights
    policy = Policy() if trains else Policy().bfloat16()
    optimizer = torch.optim.AdamW(policy.parameters(), wanted.lr, weight_decay=0) if trains else None
    draw = torch.Generator().manual_seed(1000 * wanted.seed + rank)

    state = updates.floating_as(policy, torch.bfloat16)
    whole = wanted.weights == "whole"
    channel = WholeWeights(state) if whole else WeightUpdates(state, wanted.key_every, trains)
    for step in range(1, wanted.steps + 1):
        if trains:
            channel.publish(updates.floating_as(policy, torch.bfloat16))
        else:
            channel.receive()
        rollouts = gathered_rollouts(sample(policy, wanted, draw))
        if trains:
            optimizer.zero_grad()
            grpo_loss(policy, rollouts, wanted).backward()
            optimizer.step()
            earned = reward(*rollouts[:2]).mean().item()
            if step % 20 == 0 or step == wanted.steps:
                print(f"step {step:4}  reward {earned:.4f}  sent {channel.sent_bytes:,} bytes", flush=True)

    if trains:
        channel.publish(updates.floating_as(policy, torch.bfloat16))
    else:
        channel.receive()
    held = updates.state_fingerprint(updates.floating_as(policy, torch.bfloat16))
    everyone = torch.empty(dist.get_world_size(), dtype=torch.int64)
    calls.all_gather(everyone, torch.tensor([held >> 1]))
    calls.disconnect()
    same = bool((everyone == everyone[0]).all())
    if not trains:
        return None
    return {
        "reward": earned, "sent_bytes": channel.sent_bytes, "versions": wanted.steps + 1, "identical": same,
    }  # fmt: skip


def main():
    wanted = options()
    distcomp.init_process_group()
    result = train(wanted)
    if result is not None:
        print(json.dumps(result))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

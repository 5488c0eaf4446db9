"""A recurrent policy: an agent with a GRUCell learns by REINFORCE to remember a sign through a corridor.

The sign at the entrance says whether the treasure lies left or right of the corridor's end. Without memory half of
the episodes end well at best. Run it: python examples/recurrent_policy.py [--small]
"""

import sys

import torch
from torch import Tensor, nn
from torch.distributions import Categorical

import rnnfast

SMALL = "--small" in sys.argv
CORRIDOR, UPDATES = (3, 80) if SMALL else (8, 250)
EPISODES, HIDDEN = 64, 32
LEFT, RIGHT, FORWARD = 0, 1, 2


class TMaze:
    """Many T-shaped mazes side by side. Every action is an index: LEFT, RIGHT or FORWARD."""

    def __init__(self):
        self.position = torch.zeros(EPISODES, dtype=torch.long)
        self.treasure = torch.randint(0, 2, (EPISODES,))
        self.done = torch.zeros(EPISODES, dtype=torch.bool)

    def observe(self) -> Tensor:
        """[EPISODES, 3]: the sign says left, it says right, here is the junction."""
        at_entrance = self.position == 0
        signs = [at_entrance & (self.treasure == side) for side in (LEFT, RIGHT)]
        return torch.stack([*signs, self.position == CORRIDOR], dim=1).float()

    def step(self, action: Tensor) -> Tensor:
        """The rewards: 1 for the treasure, -0.1 for a wall, 0 otherwise. A turn at the junction ends an episode."""
        at_junction = self.position == CORRIDOR
        turned = action != FORWARD
        found = at_junction & (action == self.treasure)
        hit_wall = turned != at_junction
        reward = torch.where(self.done, 0.0, found.float() - 0.1 * hit_wall.float())
        self.done |= at_junction & turned
        self.position += ~turned & ~at_junction
        return reward


class Policy(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell = rnnfast.GRUCell(3, HIDDEN)
        self.head = nn.Linear(HIDDEN, 3)

    def forward(self, observation: Tensor, hx: Tensor | None) -> tuple[Categorical, Tensor]:
        hx = self.cell(observation, hx)
        return Categorical(logits=self.head(hx)), hx


torch.manual_seed(0)
torch.set_num_threads(1)  # a network of this size gains nothing from more
policy = Policy()
optimizer = torch.optim.Adam(policy.parameters(), lr=1e-2)
for update in range(UPDATES):
    maze, hx, log_probs, rewards, entropy = TMaze(), None, [], [], 0.0
    for _ in range(2 * CORRIDOR):  # time for as many mistakes as the corridor is long
        distribution, hx = policy(maze.observe(), hx)
        action = distribution.sample()
        log_probs.append(distribution.log_prob(action) * ~maze.done)
        entropy += distribution.entropy().mean()
        rewards.append(maze.step(action))
    returns = torch.stack(rewards).flip(0).cumsum(0).flip(0)  # the reward from each step on
    advantages = returns - returns.mean(1, keepdim=True)
    loss = -(torch.stack(log_probs) * advantages).sum(0).mean() - 0.01 * entropy
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if update % (UPDATES // 5) == 0 or update == UPDATES - 1:
        print(f"update {update:3d}  mean reward {returns[0].mean():5.2f}")

"""REINFORCE as tutorials have it, to compare with: python tutorial_reinforce.py SEED STEPS

One episode per update, one forward pass per step whose graph is kept for the gradient, returns as
they are, Adam with a step size of 1e-3. It is what a reader of the tutorial that this collection
began with would run today, after mending only what no longer runs. Prints steps per second after
the first tenth, and the mean return of the last 100 episodes.
"""

import sys
import time

import gymnasium as gym
import numpy as np
import torch
from torch import nn
from torch.distributions import Categorical


class PolicyNetwork(nn.Module):
    def __init__(self, obs_size, num_actions):
        super().__init__()
        self.hidden = nn.Linear(obs_size, 128)
        self.output = nn.Linear(128, num_actions)
        self.relu, self.softmax = nn.ReLU(), nn.Softmax(dim=1)

    def forward(self, obs):
        return self.softmax(self.output(self.relu(self.hidden(obs))))


def main(seed, total_steps, gamma=0.99):
    torch.manual_seed(seed)
    env = gym.make("CartPole-v1")
    policy = PolicyNetwork(env.observation_space.shape[0], env.action_space.n)
    optimizer = torch.optim.Adam(policy.parameters(), lr=1e-3)
    step, episodic_returns, start = 0, [], None
    while step < total_steps:
        obs, _ = env.reset(seed=seed if step == 0 else None)
        log_probs, rewards, ended = [], [], False
        while not ended:
            distribution = Categorical(policy(torch.tensor(obs, dtype=torch.float32).unsqueeze(0)))
            action = distribution.sample()
            log_probs.append(distribution.log_prob(action))
            obs, reward, terminated, truncated, _ = env.step(action.item())
            rewards.append(reward)
            ended = terminated or truncated
        returns, following = [], 0.0
        for reward in reversed(rewards):
            following = reward + gamma * following
            returns.insert(0, following)
        loss = torch.stack(
            [-log_prob * g for log_prob, g in zip(log_probs, torch.tensor(returns))]
        ).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        step += len(rewards)
        episodic_returns.append(sum(rewards))
        if start is None and step >= total_steps / 10:
            start, first_step = time.perf_counter(), step
    print((step - first_step) / (time.perf_counter() - start), np.mean(episodic_returns[-100:]))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))

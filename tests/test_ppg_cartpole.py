"""The mathematics of ppg_cartpole.py: by hand, against PyTorch's distributions, finite differences.

What it has word for word from ppo_cartpole.py is tested there: all that makes a policy phase.
"""

import copy
import inspect
import math

import numpy as np
import ppg_cartpole as script
import ppo_cartpole
import pytest
import torch
from diary import (
    Diary, check_episodes, check_ppo_log, check_ppo_rewards, check_ppo_statistics, check_settings,
    recorded, side_by_side, train,
)  # fmt: skip
from torch import nn
from torch.distributions import Categorical, kl_divergence
from torch.nn.utils import parameters_to_vector

# For the tests that all scripts share. Checkpoints fall into the middle of phases.
TINY = (
    "--total-timesteps 2000 --num-envs 4 --num-minibatches 2 --update-epochs 2 --norm-obs "
    "--policy-iterations 3 --aux-epochs 2 --checkpoint-frequency 500 --eval-frequency 700 "
    "--eval-episodes 5"
)
OWN = "discrete"
OWN_FLAGS = "--total-timesteps 10000"
WRONG_SPACES = ["Pendulum-v1"]
DIVERGES = "--learning-rate 1e30"
BAD = [
    ("--policy-iterations 0", "--policy-iterations"),
    ("--aux-epochs 0", "--aux-epochs"),
    ("--clone-coef -1", "--clone-coef"),
    ("--num-envs 2 --num-steps 8 --aux-minibatches 17", "--aux-minibatches"),
    ("--num-envs 1 --num-steps 5 --num-minibatches 3", "--num-minibatches"),
]
LEARNS = [("--seed 1 --total-timesteps 60000", 100)]  # chance: 22; whole runs are in the record


@pytest.mark.parametrize("name", [
    "Actor", "Batch", "RewardScaler", "RunningStatistics", "act", "clipped_policy_loss",
    "compute_gradient", "explained_variance", "gae", "gumbel_noise", "layer", "learn",
    "log_prob_and_entropy", "make_batch", "make_env", "make_network", "play", "update",
])  # fmt: skip
def test_what_ppo_has_too_is_the_same_and_tested_there(name):
    ours, theirs = (inspect.getsource(getattr(module, name)) for module in (script, ppo_cartpole))
    assert ours == theirs


# ---- The networks --------------------------------------------------------------------------------


def make_agent(norm_obs=False, num_actions=3):
    """With weights that are not as even as those of a new one, so that all of it matters."""
    torch.manual_seed(0)
    agent = script.Agent(2, num_actions, norm_obs)
    with torch.no_grad():
        for weights in agent.parameters():
            weights += 0.3 * torch.randn_like(weights)
    if norm_obs:
        agent.obs_statistics.update(torch.tensor([[1.0, 10.0], [3.0, 30.0]]))  # 2 ± 1 and 20 ± 10
    return agent


@pytest.mark.parametrize("norm_obs", [True, False])
def test_the_heads_are_those_of_the_equations(norm_obs):
    """pi and V as in PPO; V_pi is linear in what the last hidden layer of pi's network makes."""
    agent, obs = make_agent(norm_obs), torch.tensor([[3.0, 40], [2, 20], [1e6, -1e6]])
    numbers = {name: w.detach().double().numpy() for name, w in agent.named_parameters()}
    inputs = np.array([[1.0, 2], [0, 0], [10, -10]]) if norm_obs else obs.double().numpy()

    def linear(name, x):
        return x @ numbers[f"{name}.weight"].T + numbers[f"{name}.bias"]

    hidden = np.tanh(linear("actor.2", np.tanh(linear("actor.0", inputs))))
    other = np.tanh(linear("critic.2", np.tanh(linear("critic.0", inputs))))
    logits, values, aux_values = agent.forward_with_aux(obs.expand(5, 3, 2))
    assert logits.shape == (5, 3, 3) and values.shape == aux_values.shape == (5, 3)
    expected = linear("actor.4", hidden), linear("critic.4", other)[:, 0]
    aux_expected = linear("aux_critic", hidden)[:, 0]
    for found, truth in zip((logits, values, aux_values), (*expected, aux_expected)):
        np.testing.assert_allclose(found[4].detach(), truth, rtol=1e-3, atol=1e-4)
    for found, truth in zip(agent(obs), expected):
        np.testing.assert_allclose(found.detach(), truth, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(script.Actor(agent)(obs.numpy()), expected[0], rtol=1e-3, atol=1e-4)


def test_a_new_agent_is_orthogonal_and_its_policy_nearly_uniform():
    agent = script.Agent(4, 3, norm_obs=False)
    for network, last in ((agent.actor, 0.01), (agent.critic, 1.0)):
        linears = [module for module in network if isinstance(module, nn.Linear)]
        for linear, gain in zip(linears, (math.sqrt(2), math.sqrt(2), last)):
            rows = min((linear.weight, linear.weight.T), key=len)
            expected = gain**2 * torch.eye(len(rows))
            torch.testing.assert_close(rows @ rows.T, expected, atol=1e-5, rtol=0)
    assert agent.aux_critic.weight.norm().item() == pytest.approx(1)
    assert not agent.aux_critic.bias.any()
    logits, _ = agent(torch.randn(7, 5, 4))
    assert (logits.softmax(-1) - 1 / 3).abs().max() < 0.01


def reached(agent):
    """The networks whose weights have a gradient."""
    names = [name for name, weights in agent.named_parameters()
             if weights.grad is not None and weights.grad.any()]  # fmt: skip
    return {name.partition(".")[0] for name in names}


def random_aux_batch(agent, size=8):
    """pi_old is another policy than the agent's."""
    torch.manual_seed(1)
    obs, returns, noise = torch.randn(size, 2), torch.randn(size), torch.randn(size, 3)
    return script.AuxBatch(obs, returns, agent(obs)[0].detach() + 0.5 * noise)


def test_each_loss_moves_its_own_network():
    agent = make_agent()
    batch = random_aux_batch(agent)
    log_probs, advantages = torch.full((8,), -1.1), torch.randn(8)
    steps = script.Batch(batch.obs, torch.arange(8) % 3, log_probs, advantages, batch.returns)
    script.compute_gradient(agent, steps, script.Args())
    assert reached(agent) == {"actor", "critic"}
    logits, values, aux_values = agent.forward_with_aux(batch.obs)
    for loss, networks in (
        (script.cloning_loss(batch.old_logits, logits), {"actor"}),
        (script.auxiliary_loss(aux_values, batch.returns), {"actor", "aux_critic"}),
        (script.auxiliary_loss(values, batch.returns), {"critic"}),
    ):
        agent.zero_grad()
        loss.backward(retain_graph=True)
        assert reached(agent) == networks


# ---- The losses of the auxiliary phase -----------------------------------------------------------


def test_cloning_loss_by_hand():
    """KL((1/2, 1/2) || (1/4, 3/4)) is not the other way round; the other row is its own copy."""
    even, other = torch.tensor([[0.5, 0.5], [0.9, 0.1]]), torch.tensor([[0.25, 0.75], [0.9, 0.1]])
    forward = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    backward = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)
    assert forward > backward + 0.01
    found = script.cloning_loss(even.log() + 3.0, other.log() - 7.0)  # logits are not normalised
    assert found.item() == pytest.approx(forward / 2)
    found = script.cloning_loss(other.log(), even.log())
    assert found.item() == pytest.approx(backward / 2)
    assert script.cloning_loss(even.log(), even.log()).item() == pytest.approx(0)


def test_cloning_loss_against_pytorchs_own_and_its_gradient():
    """The gradient by a logit is pi - pi_old, over the number of states."""
    torch.manual_seed(0)
    old, logits = 2 * torch.randn(2, 6, 4).double()
    logits.requires_grad_()
    loss = script.cloning_loss(old, logits)
    expected = kl_divergence(Categorical(logits=old), Categorical(logits=logits)).mean()
    torch.testing.assert_close(loss, expected)
    loss.backward()
    torch.testing.assert_close(logits.grad, (logits.softmax(-1) - old.softmax(-1)).detach() / 6)
    certain = script.cloning_loss(torch.tensor([[0.0, 200.0]]), torch.tensor([[0.0, 0.0]]))
    assert certain.item() == pytest.approx(math.log(2))  # and not 0 times infinity


def test_auxiliary_loss_is_half_the_mean_square():
    aux_values = torch.tensor([1.0, 2.0, -3.0, 0.0], requires_grad=True)
    loss = script.auxiliary_loss(aux_values, torch.tensor([1.0, 0.0, 1.0, -2.0]))
    loss.backward()
    assert loss.item() == (0 + 4 + 16 + 4) / 2 / 4
    assert aux_values.grad.tolist() == [0, 2 / 4, -4 / 4, 2 / 4]


class Table(nn.Module):
    """Logits, V and V_pi for each state. An observation is a state, one-hot."""

    def __init__(self, numbers):
        super().__init__()
        self.numbers = nn.Parameter(numbers)

    def forward_with_aux(self, obs):
        numbers = obs @ self.numbers
        return numbers[:, :-2], numbers[:, -2], numbers[:, -1]


def losses_in_numpy(numbers, states, batch, clone_coef):
    """The metrics, and the whole loss, once more from the equations, row by row."""
    rows = []
    for b, s in enumerate(states):
        pi = np.exp(numbers[s, :-2]) / np.exp(numbers[s, :-2]).sum()
        old = np.exp(batch.old_logits[b].numpy())
        old /= old.sum()
        target = batch.returns[b].item()
        aux = (numbers[s, -1] - target) ** 2 / 2
        rows.append(((numbers[s, -2] - target) ** 2 / 2, aux, (old * np.log(old / pi)).sum()))
    value_loss, aux_loss, kl = np.mean(rows, 0)
    metrics = {"losses/aux_value_loss": aux_loss, "losses/aux_kl": kl}
    return metrics, aux_loss + clone_coef * kl + value_loss


@pytest.mark.parametrize("clone_coef", [0.0, 1.0, 3.0])
def test_gradient_is_that_of_the_papers_losses(clone_coef):
    """vf_coef and ent_coef weigh nothing here."""
    torch.manual_seed(0)
    table, states = Table(torch.randn(3, 6).double()), torch.randint(3, (12,))
    returns, old_logits = torch.randn(12).double(), torch.randn(12, 4).double()
    batch = script.AuxBatch(torch.eye(3).double()[states], returns, old_logits)
    before, h = table.numbers.detach().numpy().copy(), 1e-6
    gradient = np.zeros_like(before)
    for place in np.ndindex(before.shape):
        losses = []
        for change in (h, -h):
            changed = before.copy()
            changed[place] += change
            losses.append(losses_in_numpy(changed, states.numpy(), batch, clone_coef)[1])
        gradient[place] = (losses[0] - losses[1]) / (2 * h)
    args = script.Args(clone_coef=clone_coef, max_grad_norm=0.0, vf_coef=0.1, ent_coef=9.0)
    metrics = script.compute_aux_gradient(table, batch, args)
    np.testing.assert_allclose(table.numbers.grad, gradient, atol=1e-7)
    expected, _ = losses_in_numpy(before, states.numpy(), batch, clone_coef)
    assert {tag: value.item() for tag, value in metrics.items()} == pytest.approx(expected)
    assert not any(value.requires_grad for value in metrics.values())


def test_the_gradient_of_all_weights_is_clipped_as_one_vector():
    gradients = []
    for limit in (0.0, 1e9, 0.01):  # 0: not clipped
        agent = make_agent()
        args = script.Args(max_grad_norm=limit)
        script.compute_aux_gradient(agent, random_aux_batch(agent), args)
        gradients.append(parameters_to_vector(weights.grad for weights in agent.parameters()))
    assert torch.equal(gradients[0], gradients[1]) and gradients[0].norm() > 0.1
    expected = 0.01 * gradients[0] / gradients[0].norm()
    torch.testing.assert_close(gradients[2], expected, rtol=1e-3, atol=1e-7)


# ---- The auxiliary phase -------------------------------------------------------------------------


def test_pi_old_is_the_policy_before_the_first_step():
    agent, obs, returns = make_agent(norm_obs=True), torch.randn(10, 2), torch.randn(10)
    batch = script.make_aux_batch(agent, obs, returns)
    assert batch.obs is obs and batch.returns is returns  # as they were
    assert torch.equal(batch.old_logits, agent(obs)[0]) and not batch.old_logits.requires_grad
    before = batch.old_logits.clone()
    args = script.Args(policy_iterations=1)
    script.learn_aux(agent, torch.optim.SGD(agent.parameters(), lr=0.1), batch, args)
    assert torch.equal(batch.old_logits, before) and not torch.equal(agent(obs)[0], before)


@pytest.mark.parametrize("size, iterations, parts, epochs", [(24, 3, 2, 3), (13, 2, 2, 2)])
def test_every_epoch_learns_from_every_step_once_in_a_new_order(
    monkeypatch, size, iterations, parts, epochs
):
    """In the same number of minibatches for each rollout, whatever that of the policy phase is."""
    seen = []

    def compute_aux_gradient(agent, batch, args):
        assert all(torch.equal(part, batch.obs) for part in batch)  # rows stay together
        seen.append(batch.obs.int().tolist())
        return {"losses/aux_kl": torch.tensor(float(len(seen)))}

    monkeypatch.setattr(script, "compute_aux_gradient", compute_aux_gradient)
    torch.manual_seed(0)
    settings = {"policy_iterations": iterations, "aux_minibatches": parts, "aux_epochs": epochs}
    optimizer = torch.optim.SGD([torch.zeros(1)])
    batch = script.AuxBatch(*[torch.arange(size).double()] * 3)
    metrics = script.learn_aux(None, optimizer, batch, script.Args(**settings, update_epochs=7))
    parts *= iterations
    assert len(seen) == parts * epochs and max(map(len, seen)) - min(map(len, seen)) <= 1
    orders = [sum(seen[i : i + parts], []) for i in range(0, len(seen), parts)]
    assert all(sorted(order) == list(range(size)) for order in orders)
    assert len({tuple(order) for order in orders} | {tuple(range(size))}) == epochs + 1
    assert metrics["losses/aux_kl"].item() == pytest.approx((len(seen) + 1) / 2)  # their mean


def test_each_minibatch_is_one_step_of_the_optimizer():
    """Down its own gradient: none of the step before, or of the policy phase, is left."""
    agent = make_agent()
    other, batch = copy.deepcopy(agent), random_aux_batch(agent)
    args = script.Args(policy_iterations=1, aux_minibatches=2, aux_epochs=3, max_grad_norm=0.0)
    for weights in agent.parameters():
        weights.grad = torch.ones_like(weights)
    torch.manual_seed(5)
    metrics = script.learn_aux(agent, torch.optim.SGD(agent.parameters(), lr=0.1), batch, args)
    torch.manual_seed(5)
    divergences = []
    for rows in [rows for _ in range(3) for rows in torch.randperm(8).tensor_split(2)]:
        logits, values, aux_values = other.forward_with_aux(batch.obs[rows])
        old = Categorical(logits=batch.old_logits[rows])
        divergences.append(kl_divergence(old, Categorical(logits=logits)).mean())
        squares = (values - batch.returns[rows]) ** 2 + (aux_values - batch.returns[rows]) ** 2
        loss = squares.mean() / 2 + args.clone_coef * divergences[-1]
        gradients = torch.autograd.grad(loss, list(other.parameters()))
        with torch.no_grad():
            for weights, gradient in zip(other.parameters(), gradients):
                weights -= 0.1 * gradient
    found, expected = (parameters_to_vector(each.parameters()) for each in (agent, other))
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(metrics["losses/aux_kl"], torch.stack(divergences).mean())


def test_both_values_are_learned_and_the_policy_is_kept():
    """With a weight on the KL divergence; without it, it is not."""
    torch.manual_seed(0)
    obs = torch.randn(64, 2)
    returns, kept = obs.sum(1), []
    for clone_coef in (10.0, 0.0):
        agent = make_agent()
        batch = script.make_aux_batch(agent, obs, returns)
        args = script.Args(policy_iterations=1, aux_epochs=60, clone_coef=clone_coef)
        script.learn_aux(agent, torch.optim.Adam(agent.parameters(), lr=3e-3), batch, args)
        logits, values, aux_values = agent.forward_with_aux(obs)
        for each in (values, aux_values):
            assert (each - returns).square().mean() < 0.2 * returns.var()
        kept.append(script.cloning_loss(batch.old_logits, logits).item())
    assert kept[0] < 0.1 * kept[1] and kept[0] < 0.01


# ---- The memory ----------------------------------------------------------------------------------


def test_a_phase_keeps_all_rollouts_as_they_were_until_they_are_taken(tmp_path):
    phase, array, batches = script.Phase(), np.zeros((3, 2, 4), np.float32), []
    for k in range(3):
        array[:] = np.random.default_rng(k).normal(size=array.shape)  # played into the same place
        obs = torch.from_numpy(array).flatten(0, 1)
        batches.append((obs.clone(), torch.randn(6)))
        phase.add(script.Batch(obs, *[None] * 3, batches[-1][1]))
        if k == 1:  # a checkpoint in the middle
            torch.save(phase.state_dict(), tmp_path / "state.pt")
            phase = script.Phase()
            phase.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    found = phase.take(torch.device("cpu"))
    for part, expected in zip(found, zip(*batches), strict=True):
        assert torch.equal(part, torch.cat(expected))
    assert phase.state_dict() == {"obs": [], "returns": []}


def test_a_resumed_phase_brings_its_rollouts_to_the_device():
    """A checkpoint is read to the CPU; later rollouts are elsewhere."""
    phase = script.Phase()
    phase.load_state_dict({"obs": [torch.zeros(6, 4)], "returns": [torch.zeros(6)]})
    elsewhere = [torch.zeros(6, *shape, device="meta") for shape in [(4,), (), (), (), ()]]
    phase.add(script.Batch(*elsewhere))
    obs, returns = phase.take(torch.device("meta"))
    assert obs.device == returns.device == torch.device("meta")
    assert obs.shape == (12, 4) and returns.shape == (12,)


# ---- The loop ------------------------------------------------------------------------------------

FEW = dict(
    env_id="Diary-v0", total_timesteps=600, num_envs=3, num_steps=20, num_minibatches=2,
    update_epochs=2, eval_episodes=2, learning_rate=1e-2, norm_adv=False, policy_iterations=3,
    aux_epochs=2,
)  # fmt: skip
NO_PHASE = FEW | {"policy_iterations": 1000}


@pytest.mark.parametrize("num_envs, num_steps", [(3, 20), (1, 7)])
def test_rollouts_are_what_really_happened(tmp_path, monkeypatch, num_envs, num_steps):
    """Also where an episode ends: its last observation, not the next one's first."""
    calls = recorded(monkeypatch, script, "make_batch")
    flags = FEW | {"num_envs": num_envs, "num_steps": num_steps, "norm_reward": False}
    state, points = train(script, tmp_path, **flags)
    rounds, steps = math.ceil(600 / (num_envs * num_steps)), side_by_side(num_envs)
    assert len(calls) == rounds and len(steps) == rounds * num_envs * num_steps
    assert state["envs"]["steps"] == len(steps)
    for number, ((_, *rollout, _), _) in enumerate(calls):
        for i in range(num_envs):
            happened = Diary.made[i].steps[number * num_steps : (number + 1) * num_steps]
            for column, expected in zip(rollout, zip(*happened), strict=True):
                np.testing.assert_allclose(column[:, i], np.array(expected, np.float32), rtol=1e-6)
    check_episodes(points, steps)


def test_every_environment_gets_the_action_for_what_it_shows(tmp_path, monkeypatch):
    def choose(obs):
        return (obs[:, 0] * 1000).astype(int) % 3

    monkeypatch.setattr(script, "act", lambda actor, obs, noise=0.0: choose(obs))
    train(script, tmp_path, **FEW)
    seen, chosen, *_ = zip(*(step for env in Diary.made for step in env.steps))
    assert list(chosen) == choose(np.array(seen, np.float32)).tolist() and len(set(chosen)) == 3


def test_the_order_of_the_phases(tmp_path, monkeypatch):
    """Ten rollouts, with an auxiliary phase after the 3rd, 6th and 9th, and none after the 10th.

    pi_old and the policy that plays next see the same normalisation.
    """
    order = []
    for name in ("make_batch", "learn", "make_aux_batch", "learn_aux"):
        def noting(agent, *others, name=name, function=getattr(script, name)):
            order.append((name, agent.obs_statistics.count.item()))
            return function(agent, *others)

        monkeypatch.setattr(script, name, noting)
    train(script, tmp_path, **FEW, norm_obs=True)
    expected = []
    for k in range(10):
        expected += [("make_batch", 60 * k), ("learn", 60 * k)]
        if k in (2, 5, 8):
            expected += [("make_aux_batch", 60 * (k + 1)), ("learn_aux", 60 * (k + 1))]
    assert order == expected


def test_an_auxiliary_phase_learns_from_all_steps_since_the_last(tmp_path, monkeypatch):
    """With V_targ of the policy phase, and pi_old of the agent that comes out of it."""
    batches = recorded(monkeypatch, script, "make_batch")
    phases = recorded(monkeypatch, script, "learn_aux")
    state, _ = train(script, tmp_path, **FEW)
    assert len(batches) == 10 and len(phases) == 3
    seen = np.array([step[0] for _, step in side_by_side(3)], np.float32)
    targets = torch.cat([batch.returns for _, batch in batches])
    for k, ((agent, _, batch, _), _) in enumerate(phases):
        assert batch.obs.tolist() == seen[180 * k : 180 * (k + 1)].tolist()
        assert torch.equal(batch.returns, targets[180 * k : 180 * (k + 1)])
        torch.testing.assert_close(batch.old_logits, agent(batch.obs)[0].detach())
    (kept,), (returns,) = state["phase"]["obs"], state["phase"]["returns"]  # of the 10th rollout
    assert kept.tolist() == seen[540:].tolist() and torch.equal(returns, targets[540:])


def test_the_agent_goes_from_phase_to_phase(tmp_path, monkeypatch):
    """From the first one, which is made from the seed, to the last, which is saved.

    Each kind of phase has its own Adam, which goes through the whole run.
    """
    weights, optimizers = [], {"learn": [], "learn_aux": []}
    for name in optimizers:
        def noting(agent, optimizer, *others, name=name, function=getattr(script, name)):
            optimizers[name].append(optimizer)
            weights.append(parameters_to_vector(agent.parameters()).detach())
            metrics = function(agent, optimizer, *others)
            weights.append(parameters_to_vector(agent.parameters()).detach())
            return metrics

        monkeypatch.setattr(script, name, noting)
    state, _ = train(script, tmp_path, **FEW, seed=3)
    torch.manual_seed(3)
    agent = script.Agent(2, 3, norm_obs=False)
    weights.insert(0, parameters_to_vector(agent.parameters()).detach())
    agent.load_state_dict(state["network"])
    weights.append(parameters_to_vector(agent.parameters()).detach())
    for after, before in zip(weights[::2], weights[1::2], strict=True):
        assert torch.equal(after, before)
    assert not any(torch.equal(*pair) for pair in zip(weights[1::2], weights[2::2]))
    (optimizer,), (aux_optimizer,) = map(set, optimizers.values())
    assert optimizer is not aux_optimizer
    for each in (optimizer, aux_optimizer):
        assert type(each) is torch.optim.Adam and each.param_groups[0]["eps"] == 1e-5


def test_a_run_resumes_in_the_middle_of_a_phase(tmp_path):
    """After 5 rollouts, of which 2 wait for the third; both optimizers go on, too."""
    flags = FEW | {"anneal_lr": False, "runs_dir": str(tmp_path)}
    through = script.train(script.Args(**flags))
    half = script.train(script.Args(**flags | {"total_timesteps": 300}))
    assert len(script.read_checkpoint(half.folder)["phase"]["obs"]) == 2
    script.train(script.Args(**flags, resume=half.folder))
    ours, theirs = (script.read_checkpoint(run.folder) for run in (half, through))
    for part in ("network", "optimizer", "aux_optimizer", "reward_scaler", "phase"):
        assert str(ours[part]) == str(theirs[part]), part
    assert all(torch.equal(ours["network"][name], theirs["network"][name])
               for name in ours["network"])  # fmt: skip


def test_a_batch_is_every_step_with_its_advantage(tmp_path, monkeypatch):
    """With pi_old and V_old of the agent that played: the first one is made from the seed."""
    rollouts = recorded(monkeypatch, script, "make_batch")
    learned = recorded(monkeypatch, script, "learn")
    train(script, tmp_path, **FEW | {"seed": 3, "gamma": 0.7, "gae_lambda": 0.6})
    _, obs, actions, rewards, next_obs, terminated, truncated, _ = rollouts[0][0]
    torch.manual_seed(3)
    agent = script.Agent(2, 3, norm_obs=False)
    logits, values = agent(obs)
    log_probs = Categorical(logits=logits).log_prob(actions)
    ends = terminated, truncated
    advantages = script.gae(rewards, values, agent(next_obs)[1], *ends, 0.7, 0.6)
    columns = obs, actions, log_probs, advantages, advantages + values
    _, _, batch, _ = learned[0][0]
    for part, expected in zip(batch, columns, strict=True):
        torch.testing.assert_close(part, expected.detach().flatten(0, 1))
        assert not part.requires_grad


@pytest.mark.parametrize("anneal_lr", [True, False])
def test_metrics_and_learning_rate_are_logged(tmp_path, monkeypatch, anneal_lr):
    check_ppo_log(script, tmp_path, monkeypatch, **NO_PHASE, anneal_lr=anneal_lr)


@pytest.mark.parametrize("anneal_lr", [True, False])
def test_an_auxiliary_phase_has_the_rate_of_its_last_rollout(tmp_path, monkeypatch, anneal_lr):
    """Its metrics stand in the log beside that rollout's."""
    phases = recorded(monkeypatch, script, "learn_aux")
    _, points = train(script, tmp_path, **FEW, anneal_lr=anneal_lr)
    for k, ((_, optimizer, _, _), metrics) in enumerate(phases):
        rollout = 3 * k + 2
        rate = 1e-2 * (1 - rollout / 10 if anneal_lr else 1)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(rate)
        for tag, value in metrics.items():
            assert points[tag][k] == (60 * (rollout + 1), pytest.approx(value.item())), tag
    assert len(points["losses/aux_kl"]) == 3 and len(points["losses/approx_kl"]) == 10


def test_statistics_change_only_between_updates_and_the_next_rollout(tmp_path, monkeypatch):
    check_ppo_statistics(script, tmp_path, monkeypatch, **FEW, norm_obs=True)


@pytest.mark.parametrize("norm_reward", [True, False])
def test_rewards_are_scaled_for_learning_only(tmp_path, monkeypatch, norm_reward):
    check_ppo_rewards(script, tmp_path, monkeypatch, **FEW, norm_reward=norm_reward, gamma=0.9)


def test_a_run_that_diverges_in_an_auxiliary_phase_stops_and_is_not_saved(tmp_path, monkeypatch):
    def spoil(agent, *others):
        return {"losses/aux_kl": torch.tensor(math.nan)}

    monkeypatch.setattr(script, "learn_aux", spoil)
    with pytest.raises(script.UsageError, match="not finite"):
        train(script, tmp_path, **FEW, checkpoint_frequency=60)
    (folder,) = tmp_path.iterdir()
    assert script.read_checkpoint(folder)["envs"]["steps"] == 120


@pytest.mark.parametrize("env_id, low, high", [
    ("Truncates-v0", 4.9, 5.1), ("Terminates-v0", 1.7, 1.9)
])  # fmt: skip
def test_a_time_limit_is_not_the_end_of_the_world(tmp_path, env_id, low, high):
    """Truncated for ever, a reward of 1 is worth 1 / (1 - 0.8) = 5: for V and, later, for V_pi.

    If every third step terminates, the three, which look alike, are worth 2.44, 1.8 and 1.
    """
    flags = {"env_id": env_id, "gamma": 0.8, "gae_lambda": 0.9, "total_timesteps": 1620}
    flags |= {"update_epochs": 4, "num_minibatches": 1, "vf_coef": 1.0, "max_grad_norm": 10.0}
    flags |= {"policy_iterations": 1, "aux_epochs": 8, "norm_reward": False, "num_steps": 18}
    state, _ = train(script, tmp_path, **FEW | flags)
    agent = script.Agent(1, 2, norm_obs=False)
    agent.load_state_dict(state["network"])
    _, value, aux_value = agent.forward_with_aux(torch.ones(1, 1))
    assert low < value.item() < high and low - 0.2 < aux_value.item() < high + 0.2


def test_every_setting_of_the_algorithm_changes_the_outcome(tmp_path):
    def outcome(**settings):
        state, _ = train(script, tmp_path, **FEW | {"total_timesteps": 240} | settings)
        weights = state["network"].items()
        return [value.tolist() for name, value in weights if "statistics" not in name]

    check_settings(script, outcome, {
        "seed": 2, "total_timesteps": 250, "num_envs": 4, "learning_rate": 5e-3, "anneal_lr": False,
        "num_steps": 25, "gamma": 0.3, "gae_lambda": 0.2, "num_minibatches": 3, "update_epochs": 3,
        "norm_adv": True, "clip_coef": 0.01, "ent_coef": 0.1, "vf_coef": 0.1, "max_grad_norm": 0.01,
        "norm_obs": True, "norm_reward": False, "policy_iterations": 2, "aux_epochs": 3,
        "aux_minibatches": 3, "clone_coef": 0.1,
    })  # fmt: skip

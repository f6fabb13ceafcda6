"""The mathematics of qdagger_cartpole.py: by hand, against loops, against dqn_cartpole.py.

What dqn_cartpole.py has word for word is tested there.
"""

import math

import dqn_cartpole
import numpy as np
import pytest
import qdagger_cartpole as script
import torch
from diary import Diary, check_settings, train

# For the tests that all scripts share.
TINY = (
    "--total-timesteps 2000 --teacher-steps 300 --teacher-episodes 3 --offline-steps 350 "
    "--learning-starts 100 --buffer-size 700 --target-network-frequency 50 "
    "--checkpoint-frequency 500 --eval-frequency 700 --eval-episodes 5"
)
OWN = "discrete"
OWN_FLAGS = "--total-timesteps 3000 --teacher-steps 4000 --offline-steps 1000"
WRONG_SPACES = ["Pendulum-v1"]
DIVERGES = "--learning-rate 1e30"
BAD = [
    ("--teacher nowhere", "--teacher"),
    ("--teacher-steps 1000", "--teacher-steps"),
    ("--offline-steps 19000", "--offline-steps"),
    ("--temperature 0", "--temperature"),
    ("--distill-weight -1", "--distill-weight"),
    ("--learning-starts 32", "--batch-size"),
]
LEARNS = []  # the loop is that of DQN, which learns in its test

FEW = dict(
    env_id="Diary-v0", total_timesteps=900, num_envs=3, teacher_steps=300, teacher_episodes=4,
    teacher_hidden_size=12, offline_steps=300, learning_starts=50, batch_size=16, buffer_size=1000,
    hidden_size=16, train_frequency=4, target_network_frequency=40, eval_episodes=3,
    exploration_fraction=0.5, learning_rate=1e-2,
)  # fmt: skip

# ---- distillation_loss, distill_coeff ------------------------------------------------------------


def softmax(values, temperature):
    """From its definition."""
    weights = [math.exp((value - max(values)) / temperature) for value in values]
    return [weight / sum(weights) for weight in weights]


@pytest.mark.parametrize("temperature", [0.1, 1.0, 7.0])
def test_loss_is_the_mean_divergence_from_the_teacher(temperature):
    torch.manual_seed(0)
    q_values, teacher_q = torch.randn(2, 20, 3, dtype=torch.float64)
    expected = 0.0
    for row, teacher_row in zip(q_values.tolist(), teacher_q.tolist()):
        student, teacher = softmax(row, temperature), softmax(teacher_row, temperature)
        expected += sum(t * math.log(t / s) for t, s in zip(teacher, student)) / 20
    found = script.distillation_loss(q_values, teacher_q, temperature)
    assert found.shape == () and found.item() == pytest.approx(expected, rel=1e-9)


def test_loss_sees_differences_of_values_only():
    """With the teacher's, whatever is added to a row, it is 0; and large values are no problem."""
    q_values = torch.tensor([[3000.0, -4000.0, 2999.0], [0.0, 1.0, 2.0]])
    other = q_values + torch.tensor([[100.0], [-5.0]])
    assert script.distillation_loss(other, q_values, 0.5).item() == pytest.approx(0, abs=1e-5)
    assert script.distillation_loss(q_values.flip(1), q_values, 0.5).isfinite()


def test_gradient_of_the_loss_moves_probabilities_to_the_teachers():
    """(pi - pi_T) / (temperature * B), and none for the teacher."""
    torch.manual_seed(0)
    q_values, teacher_q = torch.randn(2, 5, 3, dtype=torch.float64).requires_grad_().unbind()
    q_values.retain_grad()
    script.distillation_loss(q_values, teacher_q.detach(), 0.4).backward()
    rows = zip(q_values.tolist(), teacher_q.tolist())
    expected = [
        np.subtract(softmax(row, 0.4), softmax(other, 0.4)) / (0.4 * 5) for row, other in rows
    ]
    np.testing.assert_allclose(q_values.grad, np.array(expected), atol=1e-9)


@pytest.mark.parametrize("student, teacher, random, expected", [
    (20, 220, 20, 1.0), (120, 220, 20, 0.5), (220, 220, 20, 0.0), (500, 220, 20, 0.0),
    (5, 220, 20, 1.0),  # worse than random: not more than 1
    (-500, -80, -500, 1.0), (-185, -80, -500, 0.25), (-79, -80, -500, 0.0),  # negative returns
    (10, 20, 20, 0.0), (10, 15, 20, 0.0),  # from such a teacher nothing is to be learned
])  # fmt: skip
def test_weight_falls_from_random_play_to_the_teacher(student, teacher, random, expected):
    assert script.distill_coeff(student, teacher, random) == pytest.approx(expected)


# ---- Weaning -------------------------------------------------------------------------------------


def test_weaning_by_hand():
    """Random play returns 0, the teacher 100. Ten episodes count."""
    weaning, found = script.Weaning(), []
    for returns in ([10.0] * 9, [], [10.0], [60.0] * 5, [60.0] * 7, [110.0] * 10, [0.0] * 10):
        weaning.update(returns, 100.0, 0.0)
        found.append(weaning.coefficient)
    assert found == pytest.approx([1, 1, 0.9, 0.65, 0.4, 0, 0])  # once 0, always 0


def test_weaning_comes_back_from_a_checkpoint(tmp_path):
    weanings = [script.Weaning(), script.Weaning()]
    weanings[0].update([30.0] * 12, 100.0, 0.0)
    torch.save(weanings[0].state_dict(), tmp_path / "weaning.pt")
    weanings[1].load_state_dict(torch.load(tmp_path / "weaning.pt", weights_only=True))
    for weaning in weanings:
        assert weaning.coefficient == pytest.approx(0.7)
        weaning.update([80.0] * 5, 100.0, 0.0)
        assert weaning.coefficient == pytest.approx(0.45)


# ---- compute_gradient ----------------------------------------------------------------------------


def networks_and_batch():
    torch.manual_seed(0)
    q_network, target_network, teacher = (script.QNetwork(4, 3, size) for size in (8, 8, 5))
    batch = script.Batch(
        torch.randn(20, 4), torch.randint(3, (20,)), torch.randn(20), torch.randn(20, 4),
        torch.rand(20) < 0.3,
    )  # fmt: skip
    return q_network, target_network, teacher, batch


def gradients(network):
    return torch.cat([weights.grad.flatten() for weights in network.parameters()])


def test_without_a_teacher_gradient_and_metrics_are_those_of_dqn():
    q_network, target_network, _, batch = networks_and_batch()
    args = script.Args(gamma=0.9)
    metrics = script.compute_gradient(
        q_network, target_network, None, torch.tensor(3.0), batch, args
    )
    found = gradients(q_network)
    q_network.zero_grad()
    other = dqn_cartpole.Args(gamma=0.9)
    assert metrics == dqn_cartpole.compute_gradient(q_network, target_network, batch, other)
    torch.testing.assert_close(found, gradients(q_network), rtol=0, atol=0)


@pytest.mark.parametrize("weight", [0.0, 2.5])
def test_imitation_is_added_with_its_weight(weight):
    q_network, target_network, teacher, batch = networks_and_batch()
    args, zero = script.Args(gamma=0.9, temperature=0.5), torch.tensor(0.0)
    plain = script.compute_gradient(q_network, target_network, None, zero, batch, args)
    expected = gradients(q_network)
    q_network.zero_grad()
    loss = script.distillation_loss(q_network(batch.obs), teacher(batch.obs).detach(), 0.5)
    loss.backward()
    expected += weight * gradients(q_network)
    q_network.zero_grad()
    number = torch.tensor(weight)
    found = script.compute_gradient(q_network, target_network, teacher, number, batch, args)
    torch.testing.assert_close(gradients(q_network), expected)
    torch.testing.assert_close(found, plain | {"losses/distill_loss": loss.detach()})
    for network in (target_network, teacher):
        assert all(weights.grad is None for weights in network.parameters())


# ---- The teacher ---------------------------------------------------------------------------------


def weights_of(state):
    return [weights.tolist() for weights in state.values()]


@pytest.mark.parametrize("anneal_lr", [True, False])
def test_the_teacher_is_what_dqn_learns(tmp_path, monkeypatch, anneal_lr):
    """With the same episodes, the same weights and transitions, to the bit."""
    monkeypatch.setattr(script, "TEACHER", script.TRAINING)
    settings = FEW | {"anneal_lr": anneal_lr, "gradient_steps": 2, "tau": 0.7, "num_threads": 1}
    torch.manual_seed(5)
    q_network, buffer = script.train_teacher(script.Args(**settings, seed=3))
    assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.manual_seed(5)))
    own = {"teacher_steps", "teacher_episodes", "teacher_hidden_size", "offline_steps"}
    settings = {name: value for name, value in settings.items() if name not in own}
    settings |= {"total_timesteps": 300, "hidden_size": 12, "seed": 3}
    state, _ = train(dqn_cartpole, tmp_path, **settings)
    assert weights_of(q_network.state_dict()) == weights_of(state["network"])
    assert buffer.num_added == 300
    for column, other in zip(buffer.state_dict()["rows"], state["buffer"]["rows"], strict=True):
        assert torch.equal(column, other)


def test_a_teacher_that_diverges_stops_the_run():
    """Before the student learns from it."""
    with pytest.raises(script.UsageError, match="of the teacher is not finite"):
        script.train_teacher(script.Args(**FEW | {"learning_rate": 1e30}))


def test_without_a_teacher_the_student_is_what_dqn_learns(tmp_path):
    """With a small epsilon from the start, to the bit."""
    settings = FEW | {"offline_steps": 0, "distill_weight": 0.0}
    state, _ = train(script, tmp_path / "student", **settings)
    own = {"teacher_steps", "teacher_episodes", "teacher_hidden_size", "offline_steps"}
    own.add("distill_weight")
    settings = {name: value for name, value in settings.items() if name not in own}
    other, _ = train(dqn_cartpole, tmp_path / "dqn", **settings, start_e=0.05)
    assert weights_of(state["network"]) == weights_of(other["network"])


def test_return_is_the_mean_of_whole_episodes():
    Diary.made.clear()
    args = script.Args(**FEW | {"teacher_episodes": 7})
    network = script.QNetwork(2, 3, 8)
    found = script.mean_return(args, network, 1.0)
    ends = [[i for i, step in enumerate(env.steps) if step[4] or step[5]] for env in Diary.made]
    assert [len(numbers) for numbers in ends] == [3, 2, 2]
    assert all(numbers[-1] == len(env.steps) - 1 for numbers, env in zip(ends, Diary.made))
    rewards = [step[2] for env in Diary.made for step in env.steps]
    assert found == pytest.approx(sum(rewards) / 7)
    actions = [step[1] for env in Diary.made for step in env.steps]
    assert len(set(actions)) == 3  # at random
    assert script.mean_return(args, network, 1.0) == found  # the same episodes
    Diary.made.clear()
    with torch.no_grad():
        list(network.parameters())[-1][:] = torch.tensor([0.0, 99.0, 0.0])
    script.mean_return(args, network, 0.0)
    assert {step[1] for env in Diary.made for step in env.steps} == {1}  # its own


def test_a_run_of_dqn_is_a_teacher_and_so_is_a_student(tmp_path):
    """Its network, of whatever size, and its transitions, also where the buffer wrapped around."""
    settings = dict(
        env_id="Diary-v0", total_timesteps=300, num_envs=3, learning_starts=50, batch_size=16,
        eval_episodes=3,
    )  # fmt: skip
    runs = str(tmp_path)
    dqn = dqn_cartpole.Args(**settings, hidden_size=9, buffer_size=100, runs_dir=runs)
    folder = dqn_cartpole.train(dqn).folder
    for name in ("DQN", "QDagger"):
        args = script.Args(**FEW | {"teacher": folder, "teacher_steps": 51}, runs_dir=runs)
        envs = script.Envs(args, 1, script.TRAINING)
        q_network, buffer = script.read_teacher(args, envs)
        state = torch.load(f"{folder}/checkpoint.pt", weights_only=True)
        assert weights_of(q_network.state_dict()) == weights_of(state["network"]), name
        assert buffer.num_added == state["buffer"]["num_added"]
        for column, saved in zip(buffer.rows, state["buffer"]["rows"], strict=True):
            assert torch.equal(column, saved)
        torch.manual_seed(0)
        sampled = {tuple(row) for row in buffer.sample(5000).obs.tolist()}
        assert sampled == {tuple(row) for row in state["buffer"]["rows"][0].tolist()}
        folder = script.train(args).folder


def test_what_is_no_teacher_is_refused(tmp_path):
    """A run in another environment, of the same shapes; no checkpoint; no folder."""
    settings = dict(
        total_timesteps=200, learning_starts=64, eval_episodes=1, runs_dir=str(tmp_path)
    )
    folder = dqn_cartpole.train(dqn_cartpole.Args(env_id="CartPole-v0", **settings)).folder
    (tmp_path / "checkpoint.pt").write_text("no checkpoint")
    for teacher in (folder, str(tmp_path), str(tmp_path / "nowhere")):
        args = script.Args(teacher=teacher, runs_dir=str(tmp_path / "runs"))
        with pytest.raises(script.UsageError, match="--teacher .* is no run of dqn_cartpole.py"):
            script.train(args)
    assert not (tmp_path / "runs").exists()


# ---- The loop ------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_envs, offline_steps", [(1, 100), (3, 100), (4, 0)])
def test_the_loop_does_each_thing_when_it_is_due(tmp_path, monkeypatch, num_envs, offline_steps):
    """First from the teacher's transitions, with the whole weight; then from its own, weaned."""
    teacher, notes, targets = {}, [], []

    def train_teacher(args, function=script.train_teacher):
        teacher["network"], teacher["buffer"] = function(args)
        notes.clear()
        targets.clear()
        return teacher["network"], teacher["buffer"]

    def update(q_network, target_network, guide, weight, optimizer, batch, args, f=script.update):
        known = {tuple(row) for row in teacher["buffer"].rows.obs.tolist()} if teacher else set()
        theirs = {tuple(row) in known for row in batch.obs.tolist()}
        guided = guide is not None and guide is teacher.get("network")
        rate = optimizer.param_groups[0]["lr"]
        notes.append((guided, theirs, pytest.approx(weight), pytest.approx(rate)))
        return f(q_network, target_network, guide, weight, optimizer, batch, args)

    def update_target(*arguments, f=script.update_target):
        targets.append(len(notes))
        return f(*arguments)

    weights = []

    def wean(self, returns, teacher_return, random_return, f=script.Weaning.update):
        f(self, returns, 5.0, -5.0)  # random returns, around 0: it never is as good
        self.coefficient = max(self.coefficient, 0.01)
        weights.append(2.0 * self.coefficient)

    monkeypatch.setattr(script, "train_teacher", train_teacher)
    monkeypatch.setattr(script, "update", update)
    monkeypatch.setattr(script, "update_target", update_target)
    monkeypatch.setattr(script.Weaning, "update", wean)
    settings = {"num_envs": num_envs, "offline_steps": offline_steps, "total_timesteps": 600}
    _, points = train(script, tmp_path, **FEW | settings | {"distill_weight": 2.0})
    expected, expected_targets, step = [], [], 0
    while step < 600:
        rate, offline = 1e-2 * (1 - step / 600), step < offline_steps
        new = range(step + 1, step + num_envs + 1)
        step += num_envs
        weight = weights.pop(0)
        assert weight == 2.0 or not offline
        starts = 1 if offline else offline_steps + 50
        for due in new:
            if due >= starts and due % 4 == 0:
                expected.append((True, {offline}, weight, rate))
            if due >= starts and due % 40 == 0:
                expected_targets.append(len(expected))
    assert not weights and notes == expected and targets == expected_targets
    assert len({note[2].expected for note in notes}) > 5  # it does wean


def test_returns_of_all_student_episodes_wean(tmp_path, monkeypatch):
    """Each once, in their order, against the return of the teacher and of random play."""
    calls, measured = [], []

    def wean(self, *arguments, f=script.Weaning.update):
        calls.append(arguments)
        return f(self, *arguments)

    def mean_return(args, network, epsilon, f=script.mean_return):
        measured.append((epsilon, f(args, network, epsilon)))
        Diary.made.clear()
        return measured[-1][1]

    monkeypatch.setattr(script.Weaning, "update", wean)
    monkeypatch.setattr(script, "mean_return", mean_return)
    state, points = train(script, tmp_path, **FEW | {"end_e": 0.2, "checkpoint_frequency": 70})
    returns = [value for new, *_ in calls for value in new]
    logged = [value for _, value in points["charts/episodic_return"]]
    np.testing.assert_allclose(returns, logged, rtol=1e-5)
    assert len(returns) > 100 and state["weaning"]["returns"] == pytest.approx(returns[-10:])
    (first, teacher_return), (second, random_return) = measured
    assert (first, second) == (0.2, 1.0)
    assert all(others == [teacher_return, random_return] for _, *others in calls)


def test_losses_and_weights_are_logged(tmp_path):
    settings = {"total_timesteps": 3000, "offline_steps": 1500, "temperature": 1.0}
    _, points = train(script, tmp_path, **FEW | settings)
    for tag in ("losses/td_loss", "losses/q_values", "losses/distill_loss", "charts/distill_coeff"):
        assert [step for step, _ in points[tag]] == [1002, 2001], tag
    rates = [value for _, value in points["charts/learning_rate"]]
    np.testing.assert_allclose(
        rates, [1e-2 * (1 - 999 / 3000), 1e-2 * (1 - 1998 / 3000)], rtol=1e-5
    )
    assert points["charts/distill_coeff"][0][1] == 1.0


def test_the_student_acts_with_the_last_epsilon(tmp_path, monkeypatch):
    seen = set()

    def act(actor, obs, epsilon, f=script.act):
        seen.add(round(epsilon, 3))
        return f(actor, obs, epsilon)

    monkeypatch.setattr(script, "act", act)
    monkeypatch.setattr(script, "train_teacher", lambda args: (script.QNetwork(2, 3, 8), None))
    train(script, tmp_path, **FEW | {"offline_steps": 0, "end_e": 0.3})
    assert seen == {0.3, 1.0, 0.0}  # playing, random play as the measure, evaluation


def test_the_least_settings_are_allowed():
    least = {"teacher_steps": 65, "learning_starts": 64, "offline_steps": 10, "total_timesteps": 75}
    script.Args(**least, buffer_size=64)
    for change in ({"teacher_steps": 64}, {"total_timesteps": 74}, {"offline_steps": 11}):
        with pytest.raises(ValueError, match="--learning-starts"):
            script.Args(**least | change)


def test_every_setting_of_the_algorithm_changes_the_outcome(tmp_path, monkeypatch):
    """With a teacher that seems better than random play: in a diary, actions earn nothing."""

    def mean_return(args, network, epsilon, f=script.mean_return):
        return f(args, network, epsilon) + (0.0 if epsilon == 1 else 9.0)

    monkeypatch.setattr(script, "mean_return", mean_return)
    other = dqn_cartpole.Args(
        env_id="Diary-v0", total_timesteps=300, learning_starts=64, eval_episodes=3,
        runs_dir=str(tmp_path),
    )  # fmt: skip
    folder = dqn_cartpole.train(other).folder

    def outcome(**settings):
        short = {"total_timesteps": 400, "offline_steps": 120}
        state, _ = train(script, tmp_path, **FEW | short | settings)
        return weights_of(state["network"])

    check_settings(script, outcome, {
        "seed": 2, "total_timesteps": 410, "num_envs": 4, "teacher": folder, "teacher_steps": 200,
        "teacher_hidden_size": 13, "teacher_episodes": 5, "offline_steps": 100, "temperature": 0.5,
        "distill_weight": 0.5, "learning_rate": 5e-3, "anneal_lr": False, "buffer_size": 100,
        "gamma": 0.9, "tau": 0.5, "target_network_frequency": 50, "batch_size": 15, "start_e": 0.9,
        "end_e": 0.5, "exploration_fraction": 0.2, "learning_starts": 100, "train_frequency": 5,
        "gradient_steps": 2, "hidden_size": 15,
    })  # fmt: skip

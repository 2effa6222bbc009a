from hybrid_flax.run.cadence import Cadence, Due

NEVER = Due(False, False, False)


def test_what_is_due_follows_from_the_step():
    cadence = Cadence(total_steps=10, log_every=2, save_every=(3, 0), evaluate_every=5)
    due = [cadence.at(step) for step in range(11)]
    assert due[0] == NEVER
    assert [step for step in range(11) if due[step].log] == [1, 3, 5, 7, 9]
    assert [step for step in range(11) if due[step].save] == [3, 6, 9, 10]
    assert [step for step in range(11) if due[step].evaluate] == [5, 10]


def test_milestones_are_saved_besides():
    cadence = Cadence(total_steps=20, log_every=50, save_every=(6, 8), evaluate_every=50)
    assert [step for step in range(21) if cadence.at(step).save] == [6, 8, 12, 16, 18, 20]

"""Which matrices get more bits: units that are multiplied at once, and those that lose most for a number first."""

from slingshot.training.sensitivity import chosen, together


def test_what_is_multiplied_at_once_has_one_width():
    dense = [f"model.layers.0.self_attn.{part}_proj.weight" for part in "qkvo"]
    experts = [f"model.layers.1.mlp.experts.{i}.{part}.weight" for i in (0, 1) for part in ("gate_proj", "down_proj")]
    alone = ["model.layers.1.self_attn.q_proj.weight"]
    units = together([*dense, *experts, *alone])
    assert units == {
        "model.layers.0.self_attn.q_proj": dense[:3], "model.layers.0.self_attn.o_proj": dense[3:],
        "model.layers.1.mlp.experts.": experts, "model.layers.1.self_attn.q_proj": alone,
    }  # fmt: skip


def test_the_most_loss_for_a_number_comes_first_as_long_as_there_is_room():
    """8 bits for half of the numbers is 6 on the average; what does not fit is passed over."""
    lost, sizes = {"a": 1.0, "b": 3.0, "c": 0.5, "d": 0.1}, {"a": 10, "b": 60, "c": 20, "d": 10}
    assert chosen(lost, sizes, 4) == [] and chosen(lost, sizes, 8) == ["a", "b", "c", "d"]
    assert chosen(lost, sizes, 6) == ["a", "c", "d"]

from hybrid_flax.weights.differences import summary


def test_differences_are_counted_and_three_of_each_are_shown():
    missing = [f"params/stages/0/blocks/{i}/attn/bias" for i in range(30)]
    text = summary(missing, ["module.head.weight"], ["params/head/bias: there (7,), here (10,)"])
    assert text == (
        "  30 missing from the checkpoint, all beginning with params/stages/0/blocks/ and ending "
        "in attn/bias:\n"
        "    params/stages/0/blocks/0/attn/bias\n"
        "    params/stages/0/blocks/1/attn/bias\n"
        "    params/stages/0/blocks/2/attn/bias\n"
        "    … and 27 more\n"
        "  1 only in the checkpoint:\n"
        "    module.head.weight\n"
        "  1 of another shape or type:\n"
        "    params/head/bias: there (7,), here (10,)"
    )


def test_a_list_of_any_length_takes_few_lines():
    many = [f"a{i}.b: there (1,), here (2,)" for i in range(1000)]
    assert len(summary(many, many, many).splitlines()) == 15
    assert "1000 of another shape or type, all ending in b:" in summary([], [], many)


def test_a_prefix_ends_where_a_part_of_the_names_ends():
    text = summary([], ["module.stem.kernel", "module.stage.bias"])
    assert "all beginning with module.:" in text
    assert summary([], []) == ""

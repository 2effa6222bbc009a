from hybrid_flax.compare_predictions import main


def test_a_file_of_something_else_is_said(tmp_path, capsys):
    (tmp_path / "a.csv").write_text("name,value\nx,1\n")
    assert main([f"{tmp_path}/a.csv", f"{tmp_path}/a.csv"]) == 2
    assert "a.csv has no columns image and right1: expected what" in capsys.readouterr().err
    assert main([f"{tmp_path}/b.csv", f"{tmp_path}/a.csv"]) == 2
    assert "b.csv: No such file or directory" in capsys.readouterr().err

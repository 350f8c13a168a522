import pytest

from dasmil.cli import main


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_demo_finds_the_tumours(tmp_path, capsys):
    """The README's first command; minutes long."""
    assert main(["demo", "--output", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    finest = next(line.split() for line in lines if line.split()[:2] == ["x20", "AUROC"])
    assert float(finest[2]) >= 0.90

"""README.md: its links, commands and examples work, and so do its steps for your own text."""

import re
import textwrap
from functools import partial
from pathlib import Path

from conftest import call

import bench
import model
import spectrum
import train
from data import judge, stories
from data import prepare as prep

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_links_lead_to_what_they_name():
    links = re.findall(r"\[`(?:\w+\.)?(\w+)`\]\(([\w./]+)#L(\d+)\)", README)
    assert len(links) >= 10
    for name, path, line in links:
        there = (ROOT / path).read_text(encoding="utf-8").splitlines()[int(line) - 1]
        assert re.match(rf"\s*(def|class) {name}\b", there), (name, path, line, there)
    for path, line in re.findall(r"\]\(([\w./]+)(?:#L(\d+))?\)", README):
        assert (ROOT / path).exists(), path
        there = (ROOT / path).read_text(encoding="utf-8").splitlines()[int(line) - 1] if line else "def"
        assert re.match(r"\s*(def|class)\b", there), (path, line, there)  # for "[test](file.py#L1)"


def test_flags_and_scripts_of_the_readme_exist():
    """In every python command that is shown."""
    modules = {"train.py": train, "model.py": model, "spectrum.py": spectrum, "bench.py": bench}
    modules |= {"data/prepare.py": prep, "data/stories.py": stories, "data/judge.py": judge}
    for script, rest in re.findall(r"python ((?:data/|tests/)?\w+\.py)([^`\n]*)", README):
        assert (ROOT / script).exists(), script
        if script in modules:
            shown = call(modules[script].main, "--help")[1]
            for flag in re.findall(r" (--\w+)", rest.split("#")[0]):
                assert re.search(rf"^  (-\w, )?{flag}\b", shown, re.M), (script, flag)


def test_python_of_the_readme_runs(capsys):
    blocks = re.findall(r"(?:^    import .*\n)(?:^    .*\n|^\n(?=    ))*", README, re.M)
    assert len(blocks) == 2
    for block in blocks:
        exec(textwrap.dedent(block), {})
    assert "of the edge" in capsys.readouterr().out


def test_your_own_text_works_in_every_script(tmp_path, monkeypatch):
    """prepare, train, tell, spectrum, bench; only --judge, which knows the rules of the story world alone, refuses."""
    (tmp_path / "mine.txt").write_text(README, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(prep, "prepare", partial(prep.prepare, root=tmp_path))

    def printed(script, *arguments):
        status, out, err = call(script.main, *arguments)
        assert status == 0, err
        return out

    assert "to train on" in printed(prep, "mine.txt", "--tokenizer=stories")
    shape = "--n_layer=1 --n_head=2 --n_embd=32 --block_size=64 --batch_size=2 --steps=4 --device=cpu".split()
    trained = printed(train, *shape, f"--data={tmp_path / 'mine'}", "--attn=mla_decoupled")
    assert "val loss" in trained and "perfect" not in trained  # no floor is known
    assert printed(model, "out/ckpt.pt", "--prompt=Once", "--tokens=5").startswith("Once")
    assert "spikes" in printed(spectrum, "out/ckpt.pt") and "snapshots" in printed(spectrum, "out")
    table = printed(bench, "out/ckpt.pt", "--rounds=1", "--batch=1", "--context=8")
    assert "val" in table and "excess" not in table
    status, _, err = call(bench.main, "out/ckpt.pt", "--judge=1", "--rounds=1")
    assert status == 2 and "stories" in err

"""Other people's command lines with our attention, without code."""

from processes import fresh


def test_a_module_runs_with_our_attention_registered(tmp_path):
    (tmp_path / "theirs.py").write_text(
        "import sys\n"
        "from pathlib import Path\n"
        "from transformers import AttentionInterface\n"
        "assert __name__ == '__main__' and sys.argv[1:] == ['--model', 'x'], sys.argv\n"
        "assert 'gqa_kernels' in AttentionInterface()\n"
        f"Path({str(tmp_path)!r}, 'ran').touch()\n",
        encoding="utf-8",
    )
    fresh(
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "from gqa_kernels import run\n"
        "run.main(['theirs', '--model', 'x'])"
    )
    assert (tmp_path / "ran").exists()


def test_without_a_module_it_says_how():
    fresh(
        "from gqa_kernels import run\n"
        "try: run.main([])\n"
        "except SystemExit as exit: assert exit.code == 2"
    )

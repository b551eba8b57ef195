"""Which commit a file is of, as results say."""

import subprocess

import pytest

from llama2.checkout import commit_of


@pytest.fixture
def checkout(tmp_path):
    def git(*arguments):
        identity = ("-c", "user.name=a", "-c", "user.email=a@b")
        done = subprocess.run(
            ["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True, text=True
        )
        return done.stdout.strip()

    file = tmp_path / "file.py"
    file.write_text("1", encoding="utf-8")
    git("init", "-q")
    git("add", "file.py")
    git("commit", "-q", "-m", "one")
    return file, git("rev-parse", "--short=12", "HEAD")


def test_a_clean_and_a_changed_checkout(checkout):
    file, name = checkout
    assert commit_of(file) == name
    file.with_name("other.py").write_text("not tracked", encoding="utf-8")
    assert commit_of(file) == name
    file.write_text("2", encoding="utf-8")
    assert commit_of(file) == f"{name}+changes"


def test_a_checkout_that_does_not_hold_the_file(checkout):
    installed = checkout[0].with_name("installed.py")
    installed.write_text("of another project", encoding="utf-8")
    assert commit_of(installed) is None


def test_no_checkout(tmp_path):
    (tmp_path / "file.py").write_text("1", encoding="utf-8")
    assert commit_of(tmp_path / "file.py") is None

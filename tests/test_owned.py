"""Commands own their output from the first second, and nothing is lost at the end of a run."""

from __future__ import annotations

import pytest

import planish
import tiny
from planish.folder import owner
from planish.folder.owner import own


@pytest.fixture
def elsewhere(monkeypatch):
    """What this process owns looks to the commands like another process's."""
    monkeypatch.setattr(owner, "_held", FakeSet())


class FakeSet(set):
    """Remembers nothing, so that whoever enters again meets the lock itself."""

    def __contains__(self, place):
        return False


@pytest.mark.parametrize(
    "command",
    [
        ["compress", "{model}", "--keep", "0.8", "--method", "svd-llm", "--calibration", "{ids}"],
        ["compress", "{model}", "--keep", "0.8", "--calibration", "{ids}", "--overwrite"],
        ["sweep", "{model}", "--methods", "svd", "--keep", "0.8", "--calibration", "{ids}", "--eval-text", "{ids}"],
        ["export", "{model}", "--to", "dense"],
        ["export", "{model}", "--to", "gguf"],
        ["eora", "{model}", "--calibration", "{ids}"],
    ],
)
def test_a_live_run_is_left_alone(command, folder, ids, tmp_path, run, elsewhere):
    with own(tmp_path / "out"):
        before = sorted(tmp_path.rglob("*"))
        done = run(*(a.format(model=folder, ids=ids) for a in command), "-o", tmp_path / "out")
        assert done.exit_code == 2 and "is writing" in done.stderr and len(done.stderr.strip().splitlines()) == 1
        done = run("resume", tmp_path / "out")
        assert done.exit_code == 2 and "is writing" in done.stderr
        assert sorted(tmp_path.rglob("*")) == before


def test_generation_settings_that_transformers_would_not_save(tmp_path):
    """Several chat models come with a temperature and no sampling."""
    model = tiny.build("llama_gqa")
    model.generation_config.temperature = 0.6
    planish.compress(model, keep=0.8, method="svd-llm", calibration=tiny.windows(12, 24).flatten(), seq_len=24, n_samples=12,
                     output=tmp_path / "out")  # fmt: skip
    assert planish.load(tmp_path / "out").generation_config.temperature == 0.6


def test_what_cannot_be_saved_is_found_before_the_work(tmp_path, monkeypatch):
    class Tokenizer:
        def save_pretrained(self, folder):
            raise OSError(28, "No space left on device")

    seen = []
    with pytest.raises(OSError, match="No space"):
        planish.compress(tiny.build("llama_gqa"), Tokenizer(), keep=0.8, method="svd-llm", output=tmp_path / "out",
                         calibration=tiny.windows(12, 24).flatten(), seq_len=24, n_samples=12,
                         progress=lambda phase, done, total: seen.append(phase))  # fmt: skip
    assert "blocks" not in seen and not list(tmp_path.iterdir())

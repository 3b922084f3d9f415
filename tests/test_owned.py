"""Commands own their output from the first second, and nothing is lost at the end of a run."""

from __future__ import annotations

import pytest
import torch

import planish
import tiny
from planish.errors import InputError
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


def test_no_local_path_is_published(folder, ids, tmp_path):
    """What `push` uploads names local files by their last name alone; recipe.yaml, which stays here, says where they are."""
    planish.compress(
        folder, keep=0.8, method="svd-llm", calibration=ids, seq_len=24, n_samples=12, output=tmp_path / "out"
    )
    for name in ("planish.json", "README.md", "config.json"):
        said = (tmp_path / "out" / name).read_text()
        assert str(folder.parent) not in said and str(ids.parent) not in said and str(tmp_path) not in said, name
    assert f'"source": "{folder.name}"' in (tmp_path / "out" / "planish.json").read_text()


def test_sparsity_is_a_keyword_too(folder, ids, tmp_path):
    result = planish.compress(folder, sparsity=0.5, method="llm-drop", calibration=ids, seq_len=24, n_samples=12,
                              output=tmp_path / "out")  # fmt: skip
    gone = result.submodules["attention"]
    assert (gone["count"], gone["of"]) == (2, 3)  # a half, rounded up
    found = planish.forecast(folder, sparsity=0.5, method="llm-drop", calibration=ids, seq_len=24, n_samples=12)
    assert found.block_params_after == result.block_params_after
    for more, words in (({"keep": 0.8}, "keep cannot hold beside"), ({"method": "svd-llm"}, "no setting 'sparsity'")):
        with pytest.raises(InputError, match=words):
            planish.compress(
                folder, **{"sparsity": 0.5, "method": "llm-drop", "calibration": ids, "output": tmp_path / "n"} | more
            )


def test_loading_as_transformers_does(folder):
    assert planish.load(folder, dtype="auto").dtype == torch.float32
    pytest.importorskip("accelerate")
    assert next(planish.load(folder, device_map="cpu").parameters()).device.type == "cpu"


def test_an_export_that_cannot_be_finished_leaves_nothing(folder, tmp_path, monkeypatch):
    pytest.importorskip("onnxscript")
    from planish.export.onnx import save_whole

    (tmp_path / "m.onnx").write_text("earlier")

    def save(path):
        path.write_text("half of it")
        raise OSError(28, "No space left on device")

    with pytest.raises(InputError, match=r"cannot write .*m\.onnx: No space left"):
        save_whole(save, tmp_path / "m.onnx")
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"] and (tmp_path / "m.onnx").read_text() == "earlier"
    save_whole(
        lambda path: [path.write_text("graph"), path.with_name("m.onnx.data").write_text("weights")],
        tmp_path / "m.onnx",
    )
    assert (tmp_path / "m.onnx").read_text() == "graph" and (tmp_path / "m.onnx.data").read_text() == "weights"

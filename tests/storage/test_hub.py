"""A network goes to the Hugging Face hub and comes back, through a stand-in on this machine."""

import re
import time
from pathlib import Path

import hub_stand_in
import pytest
import timm
import tiny
import torch
import yaml
from hub_stand_in import Repository

from tetdist.apps.weights.trained import load
from tetdist.config.loading import parse
from tetdist.errors import UserError
from tetdist.storage import checkpoint, hub

pytestmark = pytest.mark.usefixtures("one_thread")

FILES = {"README.md", "classes.txt", "config.json", "model.safetensors", "recipe.yaml"}


@pytest.fixture
def there(monkeypatch, tmp_path):
    with hub_stand_in.serving(monkeypatch, tmp_path / "home") as found:
        yield found


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """Weights of a small network of the tiny data set."""
    folder = tmp_path_factory.mktemp("weights")
    return save(folder / "small.safetensors", tiny.CLASSES)


def save(path, classes):
    changes = {
        "name": "small",
        "model.num_classes": len(tiny.CLASSES),
        "data.root": "/home/me/secret",
        "init_checkpoint": "hf:them/relu",
    }
    config = parse(tiny.changed(tiny.CONFIG, changes), "test")
    torch.manual_seed(0)
    model = config.model.build(num_classes=len(tiny.CLASSES), timesteps=2)
    description = checkpoint.Description(
        config=config.as_dict(),
        classes=None if classes is None else list(classes),
        timesteps=2,
        step=7,
    )
    checkpoint.write_model_file(path, model.state_dict(), description)
    return path


def test_network_goes_out_and_comes_back(there, output_of, file, tiny_root, tmp_path):
    output = output_of("export", file, "--push", "us/small")
    repository = there.repositories["us/small"]
    assert repository.private
    (commit,) = re.findall(r"pushed http.*/us/small, commit ([0-9a-f]{40})", output)
    files = repository.files(commit)
    assert files.keys() - {".gitattributes"} == FILES
    assert all(hub_stand_in.TOKEN.encode() not in data for data in files.values())
    assert all(b"/home/me" not in data for data in files.values())
    assert hub_stand_in.TOKEN not in output
    assert files["classes.txt"].decode().split() == list(tiny.CLASSES)
    recipe = parse(yaml.safe_load(files["recipe.yaml"]), "recipe.yaml")
    assert recipe.init_checkpoint == "hf:them/relu"
    card = files["README.md"].decode()
    assert "| initial weights | hf:them/relu |" in card
    assert "eval.py hf:us/small --data ROOT" in card
    assert '"hf-hub:us/small", pretrained=True' in card

    trained = load(file)
    x = trained.examples(2)
    model = timm.create_model("hf-hub:us/small", pretrained=True).eval()
    model.set_execution("reference")
    with torch.no_grad():
        assert torch.equal(model(x), trained.model(x))
    # The next push is a commit of its own, the first one stays, and so does what the hub's own
    # pages made, except for the card.
    repository.commit({"LICENSE": b"theirs", "README.md": b"---\n---\n"})
    save(tmp_path / "other.safetensors", ("a", "b", "c", "d"))
    output = output_of("export", tmp_path / "other.safetensors", "--push", "us/small")
    files = repository.files("main")
    assert files.keys() == FILES | {".gitattributes", "LICENSE"}
    assert b"# small" in files["README.md"]
    evaluated = {}
    for source in (file, f"hf:us/small@{commit}"):
        output = output_of("eval", "--checkpoint", source, "--data", tiny_root)
        evaluated[source] = output.replace(str(source), "")
    assert len(set(evaluated.values())) == 1
    output = output_of("eval", "--checkpoint", "hf:us/small", "--data", tiny_root, status=2)
    assert "the data has other classes than hf:us/small was trained on" in output


def test_run_begins_with_a_network_of_the_hub_and_is_taught_by_it(
    there, output_of, file, main, tiny_config, monkeypatch
):
    output_of("export", file, "--push", "us/small", "--public")
    assert not there.repositories["us/small"].private
    commit = there.repositories["us/small"].hash("main")
    changes = {
        "init_checkpoint": "hf:us/small",
        "loss.distillation.teacher": f"hf:us/small@{commit}",
    }
    begun = "beginning with the weights of hf:us/small (step 7, T=2)"
    tiny.expect(main(tiny_config(changes), "max_steps=1"), begun)
    # The cache now has it, and no network is needed.
    hub_stand_in.point_to("http://127.0.0.1:9", monkeypatch)
    assert load(Path(f"hf:us/small@{commit}")).description.step == 7
    monkeypatch.setattr(time, "sleep", lambda _: None)  # between huggingface_hub's attempts
    output = output_of("eval", "--checkpoint", "hf:us/other", status=2)
    assert "http://127.0.0.1:9/us/other is not in the cache of huggingface_hub, and" in output
    assert "Connection refused" in output


def test_files_that_may_hold_code_are_not_fetched(there, tmp_path):
    repository = there.repositories["them/it"] = Repository()
    repository.commit({"pytorch_model.bin": b"code", "model.py": b"code"})
    with pytest.raises(UserError, match=r"/them/it lacks this file.*/model.safetensors"):
        load(Path("hf:them/it"))
    repository.commit({"model.safetensors": b"no weights"})
    with pytest.raises(UserError, match="is not a readable model file"):
        load(Path("hf:them/it"))
    fetched = {path.name for path in (tmp_path / "home").rglob("snapshots/*/*")}
    assert fetched == {"model.safetensors"}
    assert not any(".bin" in request or ".py" in request for request in there.requests)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("hf:small", "hf:small is not of the form hf:ORG/NAME"),
        ("hf:them/nothing", "http://127.0.0.1:.*/them/nothing does not exist"),
        ("hf:them/it@v2", "/them/it@v2 has no such revision"),
        ("hf:them/secret", "/them/secret does not exist, or is private"),
    ],
)
def test_what_cannot_be_fetched_is_named(there, tmp_path, name, words):
    there.repositories["them/it"] = Repository()
    there.repositories["them/it"].commit({"README.md": b""})
    there.repositories["them/secret"] = Repository(private=True)
    (tmp_path / "home" / "token").write_text("hf_of_somebody_else")
    with pytest.raises(UserError, match=words) as raised:
        hub.fetch(name, "model.safetensors")
    assert "hf_of" not in str(raised.value)
    assert "\n" not in str(raised.value)


def test_what_cannot_be_pushed_is_named(there, output_of, file, tmp_path, monkeypatch):
    def refused(source, repo, words):
        output = output_of("export", source, "--push", repo, status=2)
        assert words in output
        assert "hf_of" not in output

    refused(file, "them/it", "/them/it refuses this; check `hf auth whoami`, and")
    there.repositories["us/it"] = Repository()
    there.repositories["us/it"].commit({"train.py": b"", "README.md": b"", "LICENSE": b""})
    refused(file, "us/it", "us/it holds files that are not of an export (train.py)")
    nameless = save(tmp_path / "nameless.safetensors", None)
    refused(nameless, "us/new", "have no class names")
    token = tmp_path / "home" / "token"
    token.write_text("hf_of_somebody_else")
    refused(file, "us/new", "(Client error '401 Unauthorized'")
    token.unlink()
    refused(file, "us/new", "/us/new refuses this; check `hf auth whoami`")
    assert there.repositories.keys() == {"us/it"}
    token.write_text(hub_stand_in.TOKEN)
    hub_stand_in.point_to("http://127.0.0.1:9", monkeypatch)  # nobody is there
    monkeypatch.setattr(time, "sleep", lambda _: None)  # between huggingface_hub's attempts
    refused(file, "us/new", "http://127.0.0.1:9/us/new cannot be reached")

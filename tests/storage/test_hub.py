"""A network goes to the Hugging Face hub and comes back, through a stand-in on this machine."""

import hashlib
import re
from pathlib import Path

import hub_stand_in
import pytest
import timm
import tiny
import torch
import yaml
from hub_stand_in import Repository
from huggingface_hub import constants

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
    config = parse(tiny.changed(tiny.CONFIG, changes), "test", warn=False)
    torch.manual_seed(0)
    model = config.model.build(num_classes=len(tiny.CLASSES), timesteps=2)
    description = checkpoint.Description(
        config=config.as_dict(),
        classes=None if classes is None else list(classes),
        timesteps=2,
        step=7,
        validation={"top1": 61.25, "top5": 100.0},
    )
    checkpoint.write_model_file(path, model.state_dict(), description)
    return path


def test_network_goes_out_and_comes_back(there, call, file, tiny_root, tmp_path):
    status, output = call("export", file, "--push", "us/small")
    assert status == 0, output
    repository = there.repositories["us/small"]
    assert repository.private
    (commit,) = re.findall(r"pushed http.*/us/small, commit ([0-9a-f]{40})", output)
    files = repository.files(commit)
    assert files.keys() - {".gitattributes"} == FILES
    assert all(hub_stand_in.TOKEN.encode() not in data for data in files.values())
    assert all(b"/home/me" not in data for data in files.values())
    assert hub_stand_in.TOKEN not in output
    assert files["classes.txt"].decode().split() == list(tiny.CLASSES)
    recipe = parse(yaml.safe_load(files["recipe.yaml"]), "recipe.yaml", warn=False)
    assert recipe.init_checkpoint == "hf:them/relu"
    card = files["README.md"].decode()
    assert "| initial weights | hf:them/relu |" in card
    assert "--checkpoint hf:us/small --data ROOT" in card
    assert '"hf-hub:us/small", pretrained=True' in card

    trained = load(file)
    x = trained.examples(2)
    model = timm.create_model("hf-hub:us/small", pretrained=True).eval()
    model.set_execution("reference")
    with torch.no_grad():
        assert torch.equal(model(x), trained.model(x))
    # The next push is a commit of its own, and the first one stays.
    save(tmp_path / "other.safetensors", ("a", "b", "c", "d"))
    status, output = call("export", tmp_path / "other.safetensors", "--push", "us/small")
    assert status == 0, output
    evaluated = {}
    for source in (file, f"hf:us/small@{commit}"):
        status, output = call("eval", "--checkpoint", source, "--data", tiny_root)
        assert status == 0, output
        evaluated[source] = output.replace(str(source), "")
    assert len(set(evaluated.values())) == 1
    status, output = call("eval", "--checkpoint", "hf:us/small", "--data", tiny_root)
    assert status == 2
    assert "the data has other classes than hf:us/small was trained on" in output


def test_weights_are_sent_as_an_object_and_once(there, call, file):
    assert call("export", file, "--push", "us/small")[0] == 0
    (oid,) = there.objects
    steps = [
        "POST /us/small.git/info/lfs/objects/batch",
        f"PUT /lfs/{oid}",
        f"POST /lfs/{oid}/verify",
        "POST /api/models/us/small/commit/main",
    ]
    assert [one for one in there.requests if one in steps] == steps
    assert call("export", file, "--push", "us/again")[0] == 0
    assert there.requests.count(f"PUT /lfs/{oid}") == 1
    fetched = hub.fetch("hf:us/again", "model.safetensors")
    assert hashlib.sha256(fetched.read_bytes()).hexdigest() == oid


def test_repository_that_was_made_on_the_hubs_pages_is_taken(there, call, file):
    repository = there.repositories["us/made"] = Repository()
    repository.commit({".gitattributes": b"x", "LICENSE": b"theirs", "README.md": b"---\n---\n"})
    status, output = call("export", file, "--push", "us/made")
    assert status == 0, output
    files = repository.files("main")
    assert files.keys() == FILES | {".gitattributes", "LICENSE"}
    assert files["LICENSE"] == b"theirs"
    assert b"# small" in files["README.md"]


def test_without_a_network_one_sentence_says_so(there, call, file, monkeypatch):
    assert call("export", file, "--push", "us/small")[0] == 0
    commit = there.repositories["us/small"].hash("main")
    assert hub.fetch(f"hf:us/small@{commit}", "model.safetensors").is_file()
    nobody = "http://127.0.0.1:9"
    monkeypatch.setattr(constants, "ENDPOINT", nobody)
    template = f"{nobody}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    status, output = call("eval", "--checkpoint", "hf:us/other")
    assert status == 2
    assert output == (
        f"error: hf:us/other is not in the cache of huggingface_hub, and {nobody} cannot be "
        "reached ([Errno 111] Connection refused); fetch it once with a network, or give "
        "a file or folder\n"
    )
    assert hub.fetch(f"hf:us/small@{commit}", "model.safetensors").is_file()


def test_dry_run_sends_nothing(there, call, file, tmp_path):
    kept = tmp_path / "kept"
    status, output = call("export", file, "--push", "us/it", "--dry-run", "--output", kept)
    assert status == 0, output
    assert there.requests == []
    assert f"would push to {there.url}/us/it, created as private if missing" in output
    assert {path.name for path in kept.iterdir()} == FILES
    for path in kept.iterdir():
        assert f"{path.stat().st_size:,} bytes  {path.name}" in output
    assert "in 5 files\nnothing was sent" in output


def test_run_begins_with_a_network_of_the_hub_and_is_taught_by_it(
    there, call, file, main, tiny_config
):
    assert call("export", file, "--push", "us/small", "--public")[0] == 0
    assert not there.repositories["us/small"].private
    commit = there.repositories["us/small"].hash("main")
    changes = {
        "init_checkpoint": "hf:us/small",
        "loss.distillation.teacher": f"hf:us/small@{commit}",
    }
    outcome = main(tiny_config(changes), "max_steps=1")
    assert outcome.status == 0, outcome.text
    assert "beginning with the weights of hf:us/small (step 7, T=2)" in outcome.text
    # By now the cache has it, and no network is needed.
    there.repositories.clear()
    assert load(Path(f"hf:us/small@{commit}")).description.step == 7


def test_files_that_may_hold_code_are_not_fetched(there, tmp_path):
    repository = there.repositories["them/it"] = Repository()
    repository.commit({"pytorch_model.bin": b"code", "model.py": b"code"})
    with pytest.raises(UserError, match=r"hf:them/it has no model.safetensors, only model.py, pyt"):
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
        ("hf:us/small/more", "is not of the form"),
        ("hf:-a/b", "is not of the form"),
        ("hf:them/nothing", "there is no hf:them/nothing at http://127.0.0.1"),
        ("hf:them/it@v2", "hf:them/it@v2: the repository has no such revision"),
        ("hf:them/secret", "there is no hf:them/secret at http://127.0.0.1.*, or it is private"),
    ],
)
def test_what_cannot_be_fetched_is_named(there, tmp_path, name, words):
    there.repositories["them/it"] = Repository()
    there.repositories["them/it"].commit({"README.md": b""})
    there.repositories["them/secret"] = Repository(private=True)
    (tmp_path / "home" / "token").write_text("hf_of_somebody_else")
    with pytest.raises(UserError, match=words) as raised:
        load(Path(name))
    assert "hf_of" not in str(raised.value)


@pytest.mark.parametrize(
    ("status", "headers", "words"),
    [
        (500, {}, r"failed for hf:them/it \(status 500\); try again later"),
        (200, {"Content-Type": "text/html"}, "does not answer like a hub for hf:them/it"),
        (302, {"Location": "/again"}, r"cannot be reached \(.*redirects"),
    ],
)
def test_hub_that_answers_wrongly_is_not_called_away(there, status, headers, words):
    there.broken = status, headers
    with pytest.raises(UserError, match=words):
        hub.fetch("hf:them/it", "model.safetensors")


def test_hub_that_answers_nothing_is_not_waited_for(there, file, monkeypatch):
    there.broken = 0, {}
    monkeypatch.setattr(hub, "_TIMEOUT", 0.2)
    with pytest.raises(UserError, match=r"cannot be reached for us/small \(.*timed out"):
        hub.push(file.parent, "us/small", private=True, message="")


@pytest.mark.parametrize(
    ("header", "teacher", "lie"),
    [
        ("X-Linked-Etag", "hf:them/it", "../../../../elsewhere"),
        ("X-Linked-Etag", "hf:them/it", ".."),
        ("X-Repo-Commit", "hf:them/it", "../../../../elsewhere"),
        ("X-Repo-Commit", "hf:them/nothing", "../../../../elsewhere"),
        ("X-Linked-Etag", "timm:test_vit", "../../../../elsewhere"),
    ],
)
def test_hub_writes_nothing_outside_of_the_cache(
    there, main, tiny_config, tmp_path, header, teacher, lie
):
    for name in ("them/it", "timm/test_vit.r160_in1k"):
        there.repositories[name] = Repository()
        there.repositories[name].commit({"model.safetensors": b"weights"})
    there.repositories["them/nothing"] = Repository()
    there.repositories["them/nothing"].commit({"README.md": b""})
    there.lies[header] = lie
    outcome = main(tiny_config({"loss.distillation.teacher": teacher}))
    assert outcome.status == 2
    assert f"gives the path {lie!r} as ETag or commit of" in outcome.text
    assert [path.name for path in tmp_path.iterdir() if "elsewhere" in path.name] == []


def test_what_cannot_be_pushed_is_named(there, call, file, tmp_path, monkeypatch):
    def refused(source, repo, words):
        status, output = call("export", source, "--push", repo)
        assert status == 2, output
        assert words in output
        assert "hf_of" not in output

    refused(file, "them/it", "refuses this user's token for them/it (status 403)")
    there.repositories["them/it"] = Repository()
    there.repositories["them/it"].commit({".gitattributes": b""})
    refused(file, "them/it", "refuses this user's token for them/it (status 403)")
    there.repositories["us/it"] = Repository()
    there.repositories["us/it"].commit({"train.py": b"", "README.md": b"", "LICENSE": b""})
    refused(file, "us/it", "us/it holds files that are not of an export (train.py)")
    nameless = save(tmp_path / "nameless.safetensors", None)
    refused(nameless, "us/new", "have no class names")
    token = tmp_path / "home" / "token"
    token.write_text("hf_of_somebody_else")
    refused(file, "us/new", "(status 401)")
    token.unlink()
    refused(file, "us/new", "there is no token for http://127.0.0.1")
    assert there.repositories.keys() == {"them/it", "us/it"}
    token.write_text(hub_stand_in.TOKEN)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody is there
    refused(file, "us/new", "http://127.0.0.1:9 cannot be reached for us/new")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--push", "small"], "--push small: a repository's name must be ORG/NAME"),
        (["--push", "a/b", "--format", "onnx"], "leave out --format onnx"),
        (["--format", "timm", "--output", "it", "--dry-run"], "--dry-run applies to --push only"),
        (["--format", "timm"], "give --format and --output, or --push ORG/NAME"),
    ],
)
def test_arguments_are_checked(call, arguments, complaint):
    status, output = call("export", "nowhere", *arguments)
    assert status == 2
    assert complaint in output

"""Requests that name plans, the plans that there are, and the files of the page."""

from __future__ import annotations

import base64
import json
import math
import re
from collections.abc import Iterator
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
import tiny
from servers import PATH, client, pixels, post
from test_hooks import some_profile
from typer.testing import CliRunner

import ssd_janus.cli
from ssd_attach.choice import DEFAULT_BUDGET, NAMES, make_plan
from ssd_janus import Pipeline
from ssd_janus.cli.options import PolicyName
from ssd_janus.engine import Engine, Sampling
from ssd_janus.engine.own_caches import OwnCaches
from ssd_janus.serve.page import FILES
from ssd_janus.serve.plans import SERVED, Plans
from ssd_janus.serve.server import Server
from ssd_janus.serve.service import Limits, Service
from ssd_kernels import CachePlan
from ssd_kernels.policies import NEED_PROFILE

PROMPT, SEED = "two blue squares and a green star", 11


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return Pipeline(tiny.build_model(), tiny.build_processor())


@pytest.fixture(scope="module")
def server(pipe: Pipeline) -> Iterator[Server]:
    """Whose own plan is a window of half the picture."""
    made = Server(Service(pipe, make_plan("window", pipe.shape, 0.5), limits=Limits(batch=2),
                          profile=some_profile(pipe.shape)), port=0)
    yield made
    made.stop(0)


def expected(pipe: Pipeline, plan: CachePlan) -> np.ndarray:
    """What the engine draws alone."""
    tokens = Engine(pipe.model, plan).generate(pipe.prompt_tokens([PROMPT]), guidance=pipe.guidance(), seeds=[SEED],
                                               sampling=Sampling.of(pipe.model, do_sample=True))
    return np.asarray(pipe.decode(tokens)[0])


def test_requests_name_plans(server: Server, pipe: Pipeline) -> None:
    """Several at once; without a name it is the server's own."""
    named = [({}, server.service.plans.served), ({"policy": SERVED}, server.service.plans.served),
             ({"policy": "full"}, pipe.shape.full_plan()),
             ({"policy": "h2o", "budget": 0.3}, make_plan("h2o", pipe.shape, 0.3)),
             ({"policy": "decayed"}, make_plan("decayed", pipe.shape, DEFAULT_BUDGET))]
    sizes, pictures = set(), []
    for fields, plan in named:
        answer = post(server, {"prompt": PROMPT, "seed": SEED, **fields}).json()
        pictures.append(pixels(base64.b64decode(answer["data"][0]["b64_json"])))
        assert (pictures[-1] == expected(pipe, plan)).all(), fields
        size = partial(Engine.slots(Engine(pipe.model), 1)._bytes_of, rows=2,
                       max_prompt=len(pipe.prompt_tokens([PROMPT])[0]))
        assert answer["cache_bytes"] == size(plan) and answer["full_cache_bytes"] == size(pipe.shape.full_plan())
        assert answer["plan_budget"] == round(plan.budget(tiny.TOKENS), 4) and answer["kv_format"] == "auto"
        sizes.add(answer["cache_bytes"])
    assert len(sizes) == len(named) - 1 and len({picture.tobytes() for picture in pictures}) > 2

    rows = tiny.GRID - 1
    events = list(client(server).images.generate(prompt=PROMPT, stream=True, partial_images=rows, extra_body={
        "seed": SEED, "policy": "h2o", "budget": 0.3}))
    assert (pixels(base64.b64decode(events[-1].b64_json)) == pictures[3]).all() and len(events) == tiny.GRID
    seconds = [event.seconds for event in events]
    assert seconds == sorted(seconds) and 0 < seconds[-1] < 600
    assert {(event.cache_bytes, event.seed) for event in events} == {(size(named[3][1]), SEED)}


def test_plans_are_listed_and_read(server: Server, pipe: Pipeline) -> None:
    """Every one that is offered can be had, as ``generate --plan`` reads it."""
    offers = httpx2.get(f"{server.url}/v1/plans").json()
    assert offers["model"] == "janus" and offers["size"] == "24x24" and offers["rows"] == tiny.GRID
    assert offers["default"] == {"policy": SERVED, "budget": None}
    names = [offer["policy"] for offer in offers["data"]]
    assert names == [SERVED, *(name for name in NAMES if name != "online")]
    assert {*names} - {SERVED} == {*PolicyName.__members__} - {"online"}
    profile = some_profile(pipe.shape)
    for offer in offers["data"]:
        assert offer["about"] and "\n" not in offer["about"]
        for budget in offer["budgets"] or [None]:
            answer = httpx2.get(f"{server.url}/v1/plans/{offer['policy']}",
                                params={} if budget is None else {"budget": budget})
            assert answer.status_code == 200, (offer, answer.text)
            plan = CachePlan.from_dict(answer.json())
            assert plan == (server.service.plans.served if budget is None else
                            make_plan(offer["policy"], pipe.shape, budget, profile=profile))
            file = offer["policy"] if budget is None else f"{offer['policy']}-{budget:g}"
            assert answer.headers["content-disposition"] == f'inline; filename="{file}.json"'
    for text in ("0.5", "5e-1", " 0.5\n", "٠.٥"):
        answer = httpx2.get(f"{server.url}/v1/plans/window", params={"budget": text})
        assert answer.status_code == 200 and "window-0.5.json" in answer.headers["content-disposition"], text


@pytest.mark.parametrize(("fields", "param", "message"), [
    ({"policy": "online"}, "policy", "policy must be one of served, full, window"),
    ({"policy": "x" * 500}, "policy", "got 'xxx"), ({"policy": 5}, "policy", "got '5'"),
    ({"budget": 0.5}, "budget", "budget needs a policy"), ({"policy": SERVED, "budget": 0.5}, "budget", "needs a pol"),
    ({"policy": "window", "budget": 0.01}, "budget", "budget must be at least"),
    ({"policy": "full", "budget": 0.5}, "budget", "budget must be at least 1 for policy full"),
    ({"policy": "window", "budget": 0}, "budget", ""), ({"policy": "window", "budget": 1.5}, "budget", ""),
    ({"policy": "window", "budget": "half"}, "budget", ""), ({"policy": "window", "budget": math.nan}, None, "")])
def test_plans_that_are_not_there(server: Server, fields: dict[str, Any], param: str | None, message: str) -> None:
    """As parameters of a request, and where they can be, in the address of a plan."""
    before = server.service.scheduler.load.finished
    body = json.dumps({"prompt": PROMPT, **fields}).encode()
    answers = [post(server, body)]
    if isinstance(fields.get("policy"), str):
        query = {"budget": str(fields["budget"])} if "budget" in fields else {}
        answers.append(httpx2.get(f"{server.url}/v1/plans/{fields['policy']}", params=query))
    for answer in answers:
        error = answer.json()["error"]
        assert answer.status_code == 400 and message in error["message"] and len(error["message"]) < 300, error
        assert param is None or error["param"] == param
    assert server.service.scheduler.load.finished == before


def test_policies_that_need_a_profile(pipe: Pipeline) -> None:
    """Are offered where there is one; a page begins with the policy that `enable` would choose."""
    full = pipe.shape.full_plan()
    without, with_one = Plans(pipe.shape, full, None, True), Plans(pipe.shape, full, some_profile(pipe.shape), True)
    names = [{offer["policy"] for offer in plans.offers["data"]} for plans in (without, with_one)]
    assert names[1] - names[0] == NEED_PROFILE and SERVED not in names[1]
    assert without.offers["default"] == {"policy": "decayed", "budget": DEFAULT_BUDGET}
    assert with_one.offers["default"] == {"policy": "adaptive", "budget": 0.35}  # the least for this profile
    other = Pipeline(tiny.build_model(kv_heads=2), tiny.build_processor())
    with pytest.raises(ValueError, match="profile"):
        Service(other, profile=some_profile(pipe.shape))


def test_servers_of_one_plan(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where one cache holds all slots, only that plan is offered."""
    monkeypatch.setattr(OwnCaches, "any_plan", False)
    for plan, name, default in ((None, "full", 1.0), (make_plan("window", pipe.shape, 0.5), SERVED, None)):
        one = Server(Service(pipe, plan), port=0)
        try:
            offers = httpx2.get(f"{one.url}/v1/plans").json()
            assert [offer["policy"] for offer in offers["data"]] == [name]
            assert offers["default"] == {"policy": name, "budget": default}
            refusal = post(one, {"prompt": PROMPT, "policy": "h2o"})
            assert refusal.status_code == 400 and refusal.json()["error"]["param"] == "policy"
            assert post(one, {"prompt": PROMPT, "policy": name}).status_code == 200
        finally:
            one.stop(0)


def test_options_of_the_command(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, pipe: Pipeline) -> None:
    """A profile is given on, whatever the policy, and whether requests may name plans on a GPU."""
    def service(*_: Any, **options: Any) -> Service:
        raise ValueError(f"profile {options['profile'] is not None}, any plan {options['any_plan']}")

    monkeypatch.setattr("ssd_janus.serve.service.Service", service)
    file = str(tmp_path / "profile.safetensors")
    some_profile(pipe.shape).save(file)
    for options, said in (([], "profile False, any plan False"),
                          (["--any-plan", "--profile", file], "profile True, any plan True")):
        result = CliRunner().invoke(ssd_janus.cli.app, ["serve", "--model", str(folder), "--port", "0", *options])
        assert result.exit_code == 2 and said in result.stderr


def test_plans_need_the_key_and_the_page_does_not(pipe: Pipeline) -> None:
    locked = Server(Service(pipe), port=0, api_key="secret")
    try:
        for path in ("/v1/plans", "/v1/plans/full"):
            assert httpx2.get(locked.url + path).status_code == 401
            assert httpx2.get(locked.url + path, headers={"Authorization": "Bearer secret"}).status_code == 200
        for path in ("/", *(f"/{name}" for name in FILES)):
            assert httpx2.get(locked.url + path).status_code == 200
        assert httpx2.get(f"{locked.url}/index.html").status_code == 404
    finally:
        locked.stop(0)


def test_colours_have_contrast() -> None:
    """WCAG's 4.5 for texts, 3 for edges of controls, in both schemes."""
    css = (resources.files("ssd_janus.serve") / "static/page.css").read_text()
    schemes = [dict(re.findall(r"--([\w-]+): (#\w{6});", block)) for block in re.findall(r":root \{(.*?)\}", css, re.S)]
    assert len(schemes) == 2 and schemes[0].keys() == schemes[1].keys()
    for scheme in schemes:
        light = {name: luminance(value) for name, value in scheme.items()}
        for front, back, least in (("text", "ground", 4.5), ("text", "surface", 4.5), ("quiet", "ground", 4.5),
                                   ("quiet", "surface", 4.5), ("accent", "ground", 4.5), ("on-accent", "accent", 4.5),
                                   ("alert", "alert-ground", 4.5), ("edge", "surface", 3)):
            low, high = sorted((light[front], light[back]))
            assert (high + 0.05) / (low + 0.05) >= least, (front, back)


def luminance(colour: str) -> float:
    """WCAG's relative luminance."""
    parts = [int(colour[at:at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_the_page_loads_nothing_from_elsewhere(server: Server) -> None:
    """Nor may it: only files of the package, by relative addresses, so that it also works below a proxy's path."""
    page = httpx2.get(server.url)
    assert page.headers["content-type"].startswith("text/html")
    rules = dict(rule.strip().split(" ", 1) for rule in page.headers["content-security-policy"].split(";"))
    assert rules.pop("default-src") == "'none'" and {*rules.values()} == {"'self'", "'none'"}
    assert rules["frame-ancestors"] == "'none'" and page.headers["x-content-type-options"] == "nosniff"
    named = re.findall(r'(?:src|href)="([^"]+)"', page.text)
    assert sorted(named) == sorted(FILES)
    assert not re.search(r"<style|<script>|\sstyle=|\son\w+=", page.text)
    for name, kind in FILES.items():
        file = httpx2.get(f"{server.url}/{name}")
        assert file.status_code == 200 and file.headers["content-type"].partition(";")[0] == kind
        assert file.headers["content-security-policy"] == page.headers["content-security-policy"]
        assert not re.search(r"https?:(?!//www\.w3\.org/2000/svg)|url\(|@import|^import", file.text, re.M)
    labels = set(re.findall(r'<label for="(\w+)"', page.text))
    fields = set(re.findall(r'<(?:input|select|textarea) id="(\w+)"(?! type="checkbox")', page.text))
    assert fields and fields == labels
    assert "/v1/plans/{policy}" in httpx2.get(f"{server.url}/openapi.json").json()["paths"]
    assert PATH in httpx2.get(f"{server.url}/openapi.json").json()["paths"]

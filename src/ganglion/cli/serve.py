"""`ganglion serve`: one policy for many robots, language models beside it, until Ctrl-C."""

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

import ganglion
from ganglion.cli.progress import Stages
from ganglion.cli.server import serving
from ganglion.cli.settings import resolve
from ganglion.cli.signals import leave, stop_signal
from ganglion.clock import RealClock
from ganglion.generation import LanguageSpec
from ganglion.service import Residence
from ganglion.spec import PolicySpec
from ganglion.units import format_bytes


def run(args: argparse.Namespace) -> NoReturn:
    """Print the settings with their reasons, load, serve, stop cleanly."""
    resolved = resolve(args)
    print(f"ganglion {ganglion.__version__}")
    # settings that are not plain defaults are the news; --explain prints all
    for setting in resolved.settings:
        if setting.origin != "default" and not setting.path.startswith("demo."):
            print(f"  {setting.line()}")
    sys.stdout.flush()
    stages = Stages(RealClock())
    with stop_signal() as stopped, serving(resolved.config, on_stage=stages) as served:
        stages.end()
        has_key = resolved.config.serve.api_key is not None
        service, http = served.service, served.edge.url
        if service.has_policy:
            print(greeting(service.spec, http=http, ws=served.edge.ws_url, has_key=has_key))
        if service.language is not None:
            language = service.language
            models = [(spec, language.residence(spec.name)) for spec in language.language_models()]
            print(language_greeting(models, http=http, has_key=has_key))
            if not service.has_policy:
                print(f"  dashboard  {http}/")
        print("\nCtrl-C stops.", flush=True)
        stopped.wait()
        print("stopping: robots are told to reconnect (close code 1012)", file=sys.stderr)
    leave(0)


def greeting(spec: PolicySpec, *, http: str, ws: str, has_key: bool) -> str:
    """What a newcomer needs now: the address, a curl line, a five-line client, a robot."""
    header = " -H 'Authorization: Bearer KEY'" if has_key else ""
    key = ', api_key="KEY"' if has_key else ""
    entries = [
        f'"{view.key}": np.zeros(({view.height}, {view.width}, 3), np.uint8)' for view in spec.views
    ]
    entries.append(f'"{spec.state_key}": np.zeros({spec.state_dim}, np.float32)')
    observation = (",\n" + " " * 28).join(entries)
    size = f"{spec.horizon} actions of {spec.action_dim} numbers a chunk"
    return f"""serving {spec.name} ({spec.family}, version {spec.version[:12]}): {size}

  robots     {ws}
  dashboard  {http}/
  try        curl -s{header} {http}/v1/models
  client     import numpy as np
             from ganglion.client import Client
             observation = {{{observation}}}
             with Client("{ws}", robot_id="me"{key}) as client:
                 print(client.infer(observation, prompt="open the drawer").actions.shape)
  robot      ganglion run --url {ws} --world metaworld:drawer-open"""


def language_greeting(
    served: Sequence[tuple[LanguageSpec, Residence]], *, http: str, has_key: bool
) -> str:
    """What a user of language models needs now: the address, a curl line, a client."""
    header = " -H 'Authorization: Bearer KEY'" if has_key else ""
    key = "KEY" if has_key else "none"
    name = served[0][0].name
    listing = "\n".join(
        f"serving {spec.name} ({spec.family}, version {spec.version[:12]}): up to {spec.max_tokens} tokens a request, "
        f"{format_bytes(residence.weight_bytes)} of weights, {residence.stay}"
        for spec, residence in served
    )
    return f"""{listing}

  OpenAI     {http}/v1
  try        curl -s{header} {http}/v1/chat/completions -H 'Content-Type: application/json' -d '{{"model": "{name}", "messages": [{{"role": "user", "content": "Hello"}}]}}'
  client     from openai import OpenAI
             client = OpenAI(base_url="{http}/v1", api_key="{key}")
             print(client.completions.create(model="{name}", prompt="Hello", max_tokens=16).choices[0].text)"""

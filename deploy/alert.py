"""Have the Prefect server call a web address when a flow run fails or crashes.

PREFECT_API_URL=http://127.0.0.1:4200/api python deploy/alert.py https://hooks.example.org/...

The address gets a POST of {"text": "pipeline happy-otter: Failed. stage train failed: ..."}, as Slack and Mattermost read it.
The server keeps it as a secret, and shows it nowhere. Run it again to give another address; edit or remove it in the UI, under
Automations.
"""

import sys

from prefect.automations import Automation
from prefect.blocks.webhook import Webhook
from prefect.events.actions import CallWebhook
from prefect.events.schemas.automations import EventTrigger, Posture

NAME = "rwkvflow-alert"
TEXT = 'flow.name ~ " " ~ flow_run.name ~ ": " ~ flow_run.state.name ~ ". " ~ flow_run.state.message'


def main(url: str) -> None:
    """Register, or change, the address and the automation that calls it."""
    headers = {"content-type": "application/json"}
    block = Webhook(method="POST", url=url, headers=headers).save(NAME, overwrite=True)
    wanted = Automation(
        name=NAME,
        description="Tells of flow runs that failed or crashed.",
        trigger=EventTrigger(
            expect={"prefect.flow-run.Failed", "prefect.flow-run.Crashed"},
            match={"prefect.resource.id": "prefect.flow-run.*"},
            for_each={"prefect.resource.id"},
            posture=Posture.Reactive,
            threshold=1,
        ),
        actions=[CallWebhook(block_document_id=block, payload='{"text": {{ (' + TEXT + ") | tojson }}}")],
    )
    try:
        held = Automation.read(name=NAME)
    except ValueError:
        wanted.create()
    else:
        wanted.id = held.id
        wanted.update()


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])

"""`graceful serve`: updates on a schedule, and the flow UI to watch, trigger and cancel them.

One command runs two things: a Prefect server, whose database lies in the workspace, and a runner that carries out the
runs of its deployments (`flows.deployments`), each in a process of its own. Invariants:

* At most one update at a time: the deployment's concurrency limit makes a second run wait, and whatever else is
  started (another machine, `graceful update` by hand) meets the workspace's claim, for which a scheduled run waits.
* Scheduled runs do not pile up: what becomes of one that is due while another works is `schedule.overlap`. Runs that
  a person started always wait their turn.
* One service to a workspace: the second is refused by name. What a killed service left working is ended when the next
  one starts, and goes on at once where it was.
* SIGINT and SIGTERM end runs, runner and server within seconds and leave no process; a run that was ended goes on where
  it was when the next one starts. If this process is killed, the server notices and ends too.
* While it runs, other commands in the same workspace find the server through `.prefect/server.json` and show there.

A team with a Prefect server of its own sets PREFECT_API_URL: then no server is started.
"""

import asyncio
import contextlib
import os
import signal
import zoneinfo
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

from graceful.errors import GracefulError
from graceful.flows.deployments import UPDATE, deployments
from graceful.flows.overlap import crash_left_behind, keep_from_piling_up
from graceful.flows.runtime.environment import prepare_environment
from graceful.flows.runtime.notify import tell
from graceful.flows.runtime.server import flow_server
from graceful.flows.runtime.service import RUNS_LOG, end_orphan, end_server_left_behind, only_service, stuck_update
from graceful.flows.store.approvals import is_answered
from graceful.flows.store.claim import SERVICE_VARIABLE
from graceful.flows.watching import begin_update, watch_data
from graceful.processes import end_in_time, process_start

if TYPE_CHECKING:
    from prefect.runner import Runner

    from graceful.flows.settings.config import PipelineConfig
    from graceful.flows.settings.schedule import ScheduleConfig

# Runs prove every 30 s that they live (the shortest that Prefect allows); three silent minutes are a crash.
HEARTBEAT_S = 30
ZOMBIE_AFTER_S = 180
SECONDS_BETWEEN_GLANCES = 60.0
_SECONDS_TO_END = 9.0


def serve_updates(root: str, host: str = "127.0.0.1", port: int = 4200) -> None:
    """Run updates of a workspace on the schedule of its configuration until interrupted.

    Raises:
        ConfigError: the configuration, or its schedule, cannot be used.
        ServiceError: the flow server cannot be started.
    """
    from graceful.flows.settings.config import ConfigError, load_workspace_config
    from graceful.flows.store.workspace import require_workspace

    if "://" in root:
        raise ConfigError(f"scheduling updates: expected a workspace in a local folder, found {root}")
    require_workspace(root)
    config = load_workspace_config(root)
    os.environ.setdefault("PREFECT_RUNNER_POLL_FREQUENCY", "5")
    os.environ.setdefault("PREFECT_FLOWS_HEARTBEAT_FREQUENCY", str(HEARTBEAT_S))
    with only_service(root):
        end_server_left_behind(root)
        prepare_environment(root, logs_to_terminal=True)
        left = end_orphan(root)
        if left is not None:
            print(f"Ended {left}, which a killed service had left behind; it goes on now, where it was.", flush=True)
        os.environ[SERVICE_VARIABLE] = f"{os.getpid()}@{process_start(os.getpid())}"
        with flow_server(root, host, port, found_by_others=True) as api_url:
            asyncio.run(_run(root, config, api_url, at_once=left is not None))


async def _run(root: str, config: "PipelineConfig", api_url: str, *, at_once: bool) -> None:
    """Register the deployment and carry out its runs until a signal comes; `at_once`: begin with one."""
    from prefect.client.orchestration import get_client
    from prefect.runner import Runner

    from graceful.flows.settings.config import ConfigError

    wanted = config.schedule
    try:
        schedule = schedule_of(wanted)
        times = await _next_times(config, 1)
    except ValueError as error:
        line = " ".join(str(error).split())
        raise ConfigError(f"scheduling updates: [schedule] cannot be used: {line}; see 'man 5 crontab'") from None
    # The runs of a service that was stopped go on with the next start: the schedule is not paused at the end.
    runner = Runner(name=config.name, pause_on_shutdown=False)
    wanted_of = await deployments(root, config, "graceful serve", name=config.name, schedules=[schedule])
    known = {kind: await runner.aadd_deployment(deployment) for kind, deployment in wanted_of.items()}
    identity = known[UPDATE]
    async with get_client() as client:
        await _crash_zombies(client)
        # What was under way when the last service was killed goes on now, and not with the next scheduled run.
        left = [await crash_left_behind(client, one) for one in known.values()]
        if left[0] or at_once:
            await client.create_flow_run_from_deployment(identity)
    print(f"Flow UI: {api_url.removesuffix('/api')}/deployments", flush=True)
    print(f"Log of the runs: {os.path.join(root, '.prefect', RUNS_LOG)}", flush=True)
    print(f"Next update of {config.name}: {times[0]:%Y-%m-%d %H:%M %Z} ({wanted.in_words})", flush=True)
    beside = [
        asyncio.create_task(keep_from_piling_up(identity, wanted.overlap, lambda name: is_answered(root, name))),
        asyncio.create_task(_tell_when_stuck(root, config)),
    ]
    if wanted.watch_minutes is not None:
        looks = (60 * wanted.watch_minutes, 60 * wanted.quiet_minutes)
        beside.append(asyncio.create_task(watch_data(root, *looks, lambda: begin_update(identity))))
    try:
        await _until_signalled(runner)
    finally:
        for task in beside:
            task.cancel()


def schedule_of(wanted: "ScheduleConfig") -> Any:
    """Prefect's schedule of a configuration. Raises ValueError for one that Prefect cannot use."""
    from prefect.schedules import Cron, Interval

    if wanted.every_minutes is None:
        return Cron(wanted.cron, timezone=wanted.timezone)
    return Interval(timedelta(minutes=wanted.every_minutes), timezone=wanted.timezone)


async def _tell_when_stuck(root: str, config: "PipelineConfig") -> None:
    """Look every minute, until cancelled, whether an update is under way for too long; each is told once."""
    told = ""
    while True:
        with contextlib.suppress(GracefulError, OSError):
            notice = await asyncio.to_thread(stuck_update, root, config.notify.stuck_hours)
            if notice is not None and notice.key != told:
                told = notice.key
                await asyncio.to_thread(tell, root, config.name, config.notify, notice)
        await asyncio.sleep(SECONDS_BETWEEN_GLANCES)


async def _until_signalled(runner: "Runner") -> None:
    """Carry out runs; at the first SIGINT or SIGTERM cancel those under way, and let the signal do its work."""
    loop, stopped = asyncio.get_running_loop(), asyncio.Event()
    received: list[int] = []
    # start() installs a handler of its own, which leaves the runs' processes behind.
    before = {sign: signal.getsignal(sign) for sign in (signal.SIGINT, signal.SIGTERM)}
    running = asyncio.create_task(runner.start())
    while not runner.started and not running.done():
        await asyncio.sleep(0.05)

    def stop(sign: int) -> None:
        received.append(sign)
        stopped.set()

    for sign in before:
        loop.add_signal_handler(sign, stop, sign)
    waiting = asyncio.create_task(stopped.wait())
    await asyncio.wait({running, waiting}, return_when=asyncio.FIRST_COMPLETED)
    if received and not running.done():
        # What is not cancelled by then is found as left behind by the next service.
        end_in_time(_SECONDS_TO_END, 128 + received[0], with_descendants=True)
        print("Stopping: runs under way are cancelled; the next update goes on where they were.", flush=True)
        await runner.astop()
    waiting.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await running
    for sign, handler in before.items():
        loop.remove_signal_handler(sign)
        signal.signal(sign, handler)
    if received:
        signal.raise_signal(received[0])


def days_between(config: "PipelineConfig") -> float | None:
    """Days between the next two updates of a schedule; None where there are no two."""
    times = asyncio.run(_next_times(config, 2))
    return (times[1] - times[0]).total_seconds() / 86_400 if len(times) > 1 else None


async def _next_times(config: "PipelineConfig", count: int) -> list[Any]:
    from prefect.server.schemas.schedules import CronSchedule

    wanted = config.schedule
    if wanted.every_minutes is not None:
        now = datetime.now(zoneinfo.ZoneInfo(wanted.timezone))
        return [now + timedelta(minutes=number * wanted.every_minutes) for number in range(1, count + 1)]
    return await CronSchedule(cron=wanted.cron, timezone=wanted.timezone).get_dates(count)


async def _crash_zombies(client: Any) -> None:
    """Have the server mark runs as crashed whose heartbeat stopped: a killed machine cannot say so itself."""
    from prefect.client.schemas.objects import StateType
    from prefect.events.actions import ChangeFlowRunState
    from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture
    from prefect.events.schemas.events import ResourceSpecification

    name = "graceful: runs without heartbeat have crashed"
    if await client.read_automations_by_name(name):
        return
    ends = {f"prefect.flow-run.{state}" for state in ("Completed", "Failed", "Cancelled", "Crashed")}
    await client.create_automation(
        AutomationCore(
            name=name,
            trigger=EventTrigger(
                match=ResourceSpecification({"prefect.resource.id": ["prefect.flow-run.*"]}),
                for_each={"prefect.resource.id"},
                after={"prefect.flow-run.heartbeat"},
                expect={"prefect.flow-run.heartbeat", *ends},
                posture=Posture.Proactive,
                threshold=1,
                within=timedelta(seconds=ZOMBIE_AFTER_S),
            ),
            actions=[
                ChangeFlowRunState(
                    state=StateType.CRASHED, name="Crashed", message="The run's heartbeat stopped.", force=False
                )
            ],
        )
    )

"""What pods, Jobs and events mean: one test for each row of the table.

The objects are those of Kubernetes 1.34 with containerd, without the fields that do not matter.
"""

from __future__ import annotations

from typing import Any

import pytest

from asyncrt.backends.podfailures import (
    Failed,
    Memory,
    Patience,
    Verdict,
    Waiting,
    judge_job,
    judge_pod,
    judge_refusal,
    summary,
)
from asyncrt.errors import (
    AsyncrtError,
    ImageError,
    OutOfMemoryError,
    PodRejectedError,
    QuotaError,
    StartTimeoutError,
    UnschedulableError,
    WorkerLostError,
    WorkerStartError,
)

Json = dict[str, Any]

POD = "asyncrt-p-0-x7k2p"
UID = "3f2b6b52-52b4-4b52-8a36-3c1c1ad3a4f0"
IMAGE = "python:3.12-slim"
PATIENCE = Patience(start_timeout=60)
NOT_FOUND = (
    "rpc error: code = NotFound desc = failed to pull and unpack image "
    '"docker.io/library/python:3.12-slim": failed to resolve reference '
    '"docker.io/library/python:3.12-slim": docker.io/library/python:3.12-slim: not found'
)
NO_CPU = (
    "0/1 nodes are available: 1 Insufficient cpu. no new claims to deallocate, preemption: "
    "0/1 nodes are available: 1 No preemption victims found for incoming pod."
)


def condition(kind: str, status: str, reason: str = "", message: str = "") -> Json:
    return {
        "type": kind,
        "status": status,
        "lastProbeTime": None,
        "lastTransitionTime": "2025-11-24T10:00:00Z",
        **({"reason": reason} if reason else {}),
        **({"message": message} if message else {}),
    }


def pod(
    phase: str = "Pending",
    *,
    state: Json | None = None,
    conditions: list[Json] | None = None,
    node: str | None = "node-1",
    **status: Any,
) -> Json:
    """Return a pod of a pool; ``state`` is that of the worker's container."""
    containers = [
        {
            "name": "worker",
            "image": IMAGE,
            "imageID": "",
            "ready": "running" in (state or {}),
            "restartCount": 0,
            "started": "running" in (state or {}),
            "state": state,
            "lastState": {},
        }
    ]
    ready = "True" if phase == "Running" else "False"
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": POD, "namespace": "jobs", "uid": UID, "generateName": "asyncrt-p-0-"},
        "spec": {
            "containers": [
                {
                    "name": "worker",
                    "image": IMAGE,
                    "resources": {
                        "limits": {"memory": "256Mi"},
                        "requests": {"cpu": "500m", "memory": "256Mi"},
                    },
                }
            ],
            **({"nodeName": node} if node else {}),
        },
        "status": {
            "phase": phase,
            "qosClass": "Burstable",
            "conditions": [
                *(conditions or ()),
                condition("Ready", ready),
                condition("PodScheduled", "True" if node else "False"),
            ],
            **({"containerStatuses": containers} if state is not None else {}),
            **status,
        },
    }


def running() -> Json:
    return pod("Running", state={"running": {"startedAt": "2025-11-24T10:00:02Z"}})


def waiting(reason: str, message: str = "") -> Json:
    state = {"reason": reason} | ({"message": message} if message else {})
    return pod(state={"waiting": state})


def ended(code: int, reason: str, message: str = "", *, phase: str = "Failed") -> Json:
    """Return a pod whose worker has ended."""
    terminated = {
        "exitCode": code,
        "reason": reason,
        **({"message": message} if message else {}),
        "startedAt": "2025-11-24T10:00:02Z",
        "finishedAt": "2025-11-24T10:00:09Z",
        "containerID": "containerd://7c1f",
    }
    return pod(phase, state={"terminated": terminated})


def unschedulable(message: str = NO_CPU) -> Json:
    found = pod(node=None)
    found["status"]["conditions"] = [condition("PodScheduled", "False", "Unschedulable", message)]
    return found


def event(
    reason: str, message: str, *, at: str = "2025-11-24T10:00:05Z", kind: str = "Warning"
) -> Json:
    return {
        "metadata": {"name": f"{POD}.1", "namespace": "jobs", "creationTimestamp": at},
        "involvedObject": {"kind": "Pod", "name": POD, "uid": UID},
        "reason": reason,
        "message": message,
        "type": kind,
        "source": {"component": "kubelet", "host": "node-1"},
        "firstTimestamp": at,
        "lastTimestamp": at,
        "count": 1,
    }


def judged(
    found: Json, *events: Json, seconds: float = 0.0, memory: Memory | None = None, **options: Any
) -> Verdict:
    """Return the verdict on a pod that has been like this for so many seconds."""
    memory = {} if memory is None else memory
    judge_pod(found, events, now=0.0, memory=memory, patience=PATIENCE)
    return judge_pod(found, events, now=seconds, memory=memory, patience=PATIENCE, **options)


def failed(verdict: Verdict, kind: type[AsyncrtError], *, retry: bool) -> Any:
    """Return the error of a verdict, of exactly this class."""
    assert isinstance(verdict, Failed)
    assert type(verdict.error) is kind
    assert verdict.retry is retry
    if isinstance(verdict.error, WorkerStartError) and verdict.error.pod:
        assert (verdict.error.pod, verdict.error.image) == (POD, IMAGE)
    return verdict.error


def waits(verdict: Verdict, what: str, reason: str) -> str:
    """Return what a verdict says that it waits for."""
    assert isinstance(verdict, Waiting)
    assert (verdict.what, verdict.reason, verdict.count) == (what, reason, 1)
    return verdict.message


# All is well


@pytest.mark.parametrize("ready", [False, True])
def test_running_pod_is_no_news(ready: bool) -> None:
    assert judged(running(), seconds=1000, ready=ready) is None


def test_worker_that_was_done_is_no_news() -> None:
    assert judged(ended(0, "Completed", phase="Succeeded"), ready=True) is None
    assert judged(ended(0, "Completed", phase="Succeeded"), ready=True, deleted=True) is None


# Memory


def test_container_killed_for_its_memory_is_out_of_memory_with_the_limit() -> None:
    error = failed(judged(ended(137, "OOMKilled"), ready=True), OutOfMemoryError, retry=False)
    assert (error.limit_bytes, error.worker) == (256 * 2**20, POD)
    assert "memory limit of 256Mi" in str(error)


def test_worker_whose_parent_survived_was_not_killed() -> None:
    # The kubelet says OOMKilled for any killed process of the container.
    assert judged(ended(0, "OOMKilled", phase="Succeeded"), ready=True) is None


def test_limit_that_is_too_small_to_start_is_an_error_of_the_start() -> None:
    error = failed(judged(ended(137, "OOMKilled")), WorkerStartError, retry=False)
    assert "before it was ready; ask for more memory" in str(error)
    assert (error.reason, error.node) == ("OOMKilled", "node-1")


def test_out_of_memory_without_a_limit_says_so() -> None:
    found = ended(137, "OOMKilled")
    found["spec"]["containers"][0]["resources"] = {}
    error = failed(judged(found, ready=True), OutOfMemoryError, retry=False)
    assert error.limit_bytes == 0
    found["spec"]["containers"][0]["name"] = "other"
    found["status"]["containerStatuses"].append({"name": "other", "state": {}})
    assert failed(judged(found, ready=True), OutOfMemoryError, retry=False).limit_bytes == 0


# Pods that go away


@pytest.mark.parametrize(
    ("reason", "message"),
    [
        (
            "PreemptionByScheduler",
            "default-scheduler: preempting to accommodate a higher priority pod",
        ),
        ("DeletionByTaintManager", "Taint manager: deleting due to NoExecute taint"),
        ("EvictionByEvictionAPI", "Eviction API: evicting"),
        ("DeletionByPodGC", "PodGC: node no longer exists"),
        ("TerminationByKubelet", "Pod was terminated in response to imminent node shutdown."),
    ],
)
def test_disrupted_pod_is_a_lost_worker(reason: str, message: str) -> None:
    found = ended(143, "Error")
    found["status"]["conditions"].append(condition("DisruptionTarget", "True", reason, message))
    error = failed(judged(found, ready=True), WorkerLostError, retry=True)
    assert str(error) == f"pod {POD} on node node-1 went away: {reason}: {message}"
    assert error.worker == POD
    failed(judged(found), WorkerStartError, retry=True)


def test_disruption_that_has_not_come_yet_is_no_news() -> None:
    found = running()
    found["status"]["conditions"].append(condition("DisruptionTarget", "True", "Preemption"))
    assert judged(found, ready=True) is None
    failed(judged(found, ready=True, deleted=True), WorkerLostError, retry=True)


def test_evicted_pod_is_a_lost_worker() -> None:
    message = "The node was low on resource: memory. Threshold quantity: 100Mi, available: 88Mi. "
    found = pod("Failed", reason="Evicted", message=message)
    error = failed(judged(found, ready=True), WorkerLostError, retry=True)
    assert "Evicted: The node was low on resource: memory" in str(error)


@pytest.mark.parametrize(
    ("reason", "message"),
    [
        ("NodeShutdown", "Pod was rejected as the node is shutting down."),
        ("Terminated", "Pod was terminated in response to imminent node shutdown."),
        (
            "OutOfcpu",
            "Pod was rejected: Node didn't have enough resource: cpu, requested: 500, used: 1800, "
            "capacity: 2000",
        ),
        ("OutOfnvidia.com/gpu", "Pod was rejected: Node didn't have enough resource"),
        ("TaintToleration", "Pod was rejected: Predicate TaintToleration failed"),
        ("UnexpectedAdmissionError", "Pod was rejected: Allocate failed due to no devices"),
        ("NodeAffinity", "Pod was rejected: Predicate NodeAffinity failed"),
    ],
)
def test_pod_that_its_node_does_not_take_is_tried_again(reason: str, message: str) -> None:
    error = failed(
        judged(pod("Failed", reason=reason, message=message)), WorkerStartError, retry=True
    )
    assert (error.reason, error.detail, error.node) == (reason, message, "node-1")


def test_pod_that_any_node_would_refuse_is_rejected() -> None:
    message = 'Pod was rejected: forbidden sysctl: "kernel.shm_rmid_forced" not allowlisted'
    found = pod("Failed", reason="SysctlForbidden", message=message)
    error = failed(judged(found), PodRejectedError, retry=False)
    assert message in str(error)
    failed(judged(found, ready=True), WorkerLostError, retry=True)


@pytest.mark.parametrize(
    "found",
    [
        pod("Unknown", state={"running": {}}),
        pod(
            "Running",
            state={"running": {}},
            reason="NodeLost",
            message="Node node-1 which was running pod is unresponsive",
        ),
        ended(137, "ContainerStatusUnknown", "The container could not be located"),
    ],
    ids=["Unknown", "NodeLost", "ContainerStatusUnknown"],
)
def test_pod_on_a_lost_node_is_a_lost_worker(found: Json) -> None:
    failed(judged(found, ready=True), WorkerLostError, retry=True)


def test_pod_on_a_node_that_is_not_ready_is_a_lost_worker_until_it_comes_back() -> None:
    gone = event("NodeNotReady", "Node is not ready")
    found = running()
    assert judged(found, gone, ready=True) is None  # it came back: the pod is Ready again
    found["status"]["conditions"] = [condition("Ready", "False")]
    assert judged(found, ready=True) is None
    error = failed(judged(found, gone, ready=True), WorkerLostError, retry=True)
    assert "NodeNotReady: Node is not ready" in str(error)


@pytest.mark.parametrize(("ready", "kind"), [(True, WorkerLostError), (False, WorkerStartError)])
def test_deleted_pod_is_a_lost_worker(ready: bool, kind: type[AsyncrtError]) -> None:
    error = failed(judged(running(), ready=ready, deleted=True), kind, retry=True)
    assert "Deleted: it was deleted while it ran" in str(error)


def test_failed_pod_that_says_nothing_is_tried_again() -> None:
    error = failed(judged(pod("Failed")), WorkerStartError, retry=True)
    assert "it did not say why" in str(error)


# Images


@pytest.mark.parametrize("reason", ["ErrImagePull", "ImagePullBackOff"])
def test_image_that_cannot_be_pulled_is_an_error_after_its_grace(reason: str) -> None:
    message = NOT_FOUND
    if reason == "ImagePullBackOff":
        message = f'Back-off pulling image "{IMAGE}": ErrImagePull: {NOT_FOUND}'
    assert waits(judged(waiting(reason, message), seconds=14), "starting", reason) == message
    error = failed(judged(waiting(reason, message), seconds=15), ImageError, retry=False)
    assert (error.image, error.reason, error.detail) == (IMAGE, reason, message)
    assert NOT_FOUND in str(error)
    assert str(error).endswith("; is its name right?")


def test_grace_of_an_image_is_counted_over_its_changing_reasons_and_not_over_start_timeout() -> (
    None
):
    memory: Memory = {}
    options: Json = {"memory": memory, "patience": Patience(start_timeout=8)}
    pull, back_off = waiting("ErrImagePull", NOT_FOUND), waiting("ImagePullBackOff", NOT_FOUND)
    assert isinstance(judge_pod(pull, now=100, **options), Waiting)
    assert isinstance(judge_pod(back_off, now=107, **options), Waiting)
    failed(judge_pod(pull, now=108, **options), ImageError, retry=False)


def test_registrys_words_are_taken_from_the_event_where_the_pod_has_none() -> None:
    # Kubernetes before 1.32
    pulled = event("Failed", f'Failed to pull image "{IMAGE}": {NOT_FOUND}')
    again = event("Failed", "Error: ImagePullBackOff")
    found = waiting("ImagePullBackOff", f'Back-off pulling image "{IMAGE}"')
    error = failed(judged(found, pulled, again, seconds=20), ImageError, retry=False)
    assert NOT_FOUND in error.detail
    bare = failed(judged(found, again, seconds=20), ImageError, retry=False)
    assert bare.detail == f'Back-off pulling image "{IMAGE}"'


@pytest.mark.parametrize(
    ("reason", "message"),
    [
        (
            "InvalidImageName",
            'Failed to apply default image tag "Python:3": couldn\'t parse image name "Python:3": '
            "invalid reference format: repository name (library/Python) must be lowercase",
        ),
        (
            "ErrImageNeverPull",
            'Container image "x" is not present with pull policy of Never',
        ),
    ],
)
def test_image_that_no_time_helps_is_an_error_at_once(reason: str, message: str) -> None:
    error = failed(judged(waiting(reason, message)), ImageError, retry=False)
    assert message in str(error)


@pytest.mark.parametrize(
    ("message", "hint"),
    [
        (
            "failed to authorize: failed to fetch anonymous token: unexpected status from GET "
            "request to https://auth.docker.io/token: 401 Unauthorized",
            "image_pull_secrets names a Secret",
        ),
        (
            "pull access denied, repository does not exist or may require authorization: server "
            "message: insufficient_scope: authorization failed",
            "or the name is wrong",
        ),
        ("429 Too Many Requests - toomanyrequests: You have reached your limit", "use a mirror"),
        ("no match for platform in manifest: not found", "another architecture"),
        ("tls: failed to verify certificate: x509: unknown authority", "does not trust"),
        ("dial tcp: lookup registry.local: no such host", "does not reach the registry"),
        ("something that nobody has seen", "something that nobody has seen"),
    ],
)
def test_error_of_an_image_ends_with_what_most_likely_helps(message: str, hint: str) -> None:
    found = waiting("ErrImagePull", f"rpc error: code = Unknown desc = {message}")
    error = failed(judged(found, seconds=20), ImageError, retry=False)
    assert message in str(error)
    assert hint in str(error)[str(error).index(message) :]


def test_init_containers_image_is_told_too() -> None:
    found = waiting("PodInitializing")
    state = {"waiting": {"reason": "ErrImagePull", "message": NOT_FOUND}}
    found["status"]["initContainerStatuses"] = [{"name": "prepare", "state": state}]
    assert waits(judged(found), "starting", "ErrImagePull") == NOT_FOUND


# Pods that Kubernetes refuses


def test_missing_secret_of_the_environment_is_a_rejection_after_its_grace() -> None:
    found = waiting("CreateContainerConfigError", 'secret "db" not found')
    message = waits(judged(found, seconds=14), "starting", "CreateContainerConfigError")
    assert message == 'CreateContainerConfigError: secret "db" not found'
    error = failed(judged(found, seconds=15), PodRejectedError, retry=False)
    assert str(error).endswith('secret "db" not found; does it exist in the namespace?')


def test_image_that_runs_as_root_is_a_rejection_with_the_fix() -> None:
    said = 'container has runAsNonRoot and image will run as root (pod: "x", container: worker)'
    found = waiting("CreateContainerConfigError", said)
    error = failed(judged(found, seconds=15), PodRejectedError, retry=False)
    assert str(error).endswith("run_as_user must be a uid that is not 0")


def test_missing_secret_of_a_volume_is_a_rejection_after_its_grace() -> None:
    said = 'MountVolume.SetUp failed for volume "secret-0" : secret "tls" not found'
    mount = event("FailedMount", said)
    found = waiting("ContainerCreating")
    assert waits(judged(found, mount, seconds=14), "starting", "FailedMount") == said
    error = failed(judged(found, mount, seconds=15), PodRejectedError, retry=False)
    assert (error.reason, error.detail) == ("FailedMount", said)


def test_volume_that_is_only_slow_has_the_whole_start_timeout() -> None:
    said = 'Multi-Attach error for volume "pvc-1" Volume is already used by pod(s) other'
    attach = event("FailedAttachVolume", said)
    found = waiting("ContainerCreating")
    assert waits(judged(found, attach, seconds=59), "starting", "FailedAttachVolume") == said
    failed(judged(found, attach, seconds=60), PodRejectedError, retry=False)


def test_volume_that_came_at_last_is_forgotten() -> None:
    said = 'MountVolume.SetUp failed for volume "asyncrt-settings" : secret "asyncrt-p" not found'
    mount = event("FailedMount", said)
    found = waiting("ContainerCreating")
    pulling = event("Pulling", f'Pulling image "{IMAGE}"', at="2025-11-24T10:00:06Z", kind="Normal")
    message = waits(judged(found, pulling, mount, seconds=50), "starting", "Pulling")
    assert message == f'Pulling image "{IMAGE}"'
    found["status"]["conditions"].append(condition("PodReadyToStartContainers", "True"))
    assert isinstance(judged(found, mount, seconds=50), Waiting)


PSS = (
    'Error creating: pods "asyncrt-p-0-x7k2p" is forbidden: violates PodSecurity '
    '"restricted:latest": runAsNonRoot != true (pod must not set '
    "securityContext.runAsNonRoot=false)"
)


def job(*conditions: Json) -> Json:
    return {
        "metadata": {"name": "asyncrt-p", "namespace": "jobs", "uid": "job-uid"},
        "spec": {"completions": 3, "parallelism": 3},
        "status": {"conditions": list(conditions)} if conditions else {},
    }


def judged_job(found: Json, *events: Json, seconds: float = 0.0, **options: Any) -> Verdict:
    memory: Memory = {}
    options = {"missing": 3, "memory": memory, "patience": PATIENCE, **options}
    judge_job(found, events, now=0.0, **options)
    return judge_job(found, events, now=seconds, **options)


@pytest.mark.parametrize(
    ("message", "hint"),
    [
        (PSS, "the namespace forbids what run_as_user"),
        (
            'Error creating: pods "a" is forbidden: error looking up service account jobs/robot: '
            'serviceaccount "robot" not found',
            "does the service_account exist",
        ),
        (
            'Error creating: pods "a" is forbidden: no PriorityClass with name high was found',
            "does the priority_class exist?",
        ),
        (
            'Error creating: pods "a" is forbidden: failed quota: compute: must specify '
            "limits.cpu for: worker",
            "set it with pod_patch",
        ),
        (
            'Error creating: admission webhook "policy.example.com" denied the request: '
            "image must come from our registry",
            "image must come from our registry",
        ),
        (
            'Error creating: pods "a" is forbidden: maximum memory usage per Container is '
            "128Mi, but limit is 256Mi",
            "maximum memory usage per Container is 128Mi",
        ),
        (
            'Error creating: Pod "asyncrt-p-0-x7k2p" is invalid: spec.containers[1].image: '
            "Required value",
            "spec.containers[1].image: Required value",
        ),
    ],
)
def test_pod_that_is_not_admitted_is_a_rejection_at_once(message: str, hint: str) -> None:
    verdict = judged_job(job(), event("FailedCreate", message))
    error = failed(verdict, PodRejectedError, retry=False)
    assert error.detail == message
    assert hint in str(error)
    assert str(error).startswith("Kubernetes refuses the workers' pods: ")
    assert "x7k2p" not in str(error)


def test_server_in_trouble_is_waited_for() -> None:
    message = (
        'Error creating: Internal error occurred: failed calling webhook "x": Post '
        '"https://x.svc:443/": dial tcp 10.0.0.1:443: connect: connection refused'
    )
    verdict = judged_job(job(), event("FailedCreate", message), seconds=59)
    assert isinstance(verdict, Waiting)
    assert (verdict.what, verdict.count) == ("not created", 3)
    verdict = judged_job(job(), event("FailedCreate", message), seconds=60)
    assert "connection refused" in str(failed(verdict, StartTimeoutError, retry=True))


# Quota


QUOTA = (
    'Error creating: pods "asyncrt-p-0-x7k2p" is forbidden: exceeded quota: compute, requested: '
    "requests.cpu=500m, used: requests.cpu=2, limited: requests.cpu=2"
)
QUOTA_SAID = (
    "exceeded quota: compute, requested: requests.cpu=500m, used: requests.cpu=2, "
    "limited: requests.cpu=2"
)


def test_exceeded_quota_is_waited_for_until_start_timeout() -> None:
    denied = event("FailedCreate", QUOTA)
    verdict = judged_job(job(), denied, seconds=59)
    assert verdict == Waiting("not created", "FailedCreate", QUOTA_SAID, 3)
    error = failed(judged_job(job(), denied, seconds=60), QuotaError, retry=True)
    assert QUOTA_SAID in str(error)
    assert isinstance(error, TimeoutError)


def test_refusal_of_the_job_itself_is_judged_alike() -> None:
    # The body of a 403 to the POST of a Job.
    message = (
        'jobs.batch "asyncrt-p" is forbidden: exceeded quota: objects, requested: '
        "count/jobs.batch=1, used: count/jobs.batch=5, limited: count/jobs.batch=5"
    )
    verdict = judge_refusal(message, waited=0, patience=PATIENCE)
    assert isinstance(verdict, Waiting)
    assert "exceeded quota: objects" in verdict.message


def test_events_of_the_past_do_not_matter() -> None:
    denied = event("FailedCreate", PSS)
    later = event("SuccessfulCreate", "Created pod: x", at="2025-11-24T10:00:09Z", kind="Normal")
    assert judged_job(job(), denied, missing=0) is None
    assert judged_job(job(), later, denied) is None
    assert judged_job(job()) is None


def test_quota_that_was_free_for_a_while_starts_a_new_wait() -> None:
    memory: Memory = {}
    options: Json = {"memory": memory, "patience": PATIENCE}
    denied = event("FailedCreate", QUOTA)
    assert isinstance(judge_job(job(), [denied], missing=1, now=0, **options), Waiting)
    assert judge_job(job(), [denied], missing=0, now=50, **options) is None
    assert isinstance(judge_job(job(), [denied], missing=1, now=100, **options), Waiting)
    assert isinstance(judge_job(job(), [denied], missing=1, now=160, **options), Failed)


# Scheduling


def test_pod_without_a_node_is_unschedulable_after_start_timeout() -> None:
    message = waits(judged(unschedulable(), seconds=59), "pending", "Unschedulable")
    assert message == "0/1 nodes are available: 1 Insufficient cpu"
    error = failed(judged(unschedulable(), seconds=60), UnschedulableError, retry=False)
    assert (error.detail, error.node, error.pod) == (NO_CPU, "", POD)
    assert isinstance(error, TimeoutError)
    assert str(error) == (
        f"pod {POD} had no node within start_timeout=60 s: Unschedulable: "
        "0/1 nodes are available: 1 Insufficient cpu"
    )


def test_gate_of_scheduling_is_waited_for() -> None:
    found = unschedulable()
    message = "Scheduling is blocked due to non-empty scheduling gates"
    found["status"]["conditions"] = [condition("PodScheduled", "False", "SchedulingGated", message)]
    assert waits(judged(found), "pending", "SchedulingGated") == message


def test_pod_that_nothing_is_known_of_is_starting() -> None:
    found = pod(node=None)
    found["status"] = {"phase": "Pending", "qosClass": "Burstable"}
    assert waits(judged(found, seconds=5), "starting", "") == ""
    del found["status"]
    assert waits(judged(found, seconds=5), "starting", "") == ""


# Other starts that fail


def test_start_that_takes_too_long_says_what_it_was_doing() -> None:
    pulling = event("Pulling", f'Pulling image "{IMAGE}"', kind="Normal")
    found = waiting("ContainerCreating")
    error = failed(judged(found, pulling, seconds=60), StartTimeoutError, retry=True)
    assert str(error).endswith(f'Pulling image "{IMAGE}"')


def test_trouble_of_the_node_is_told_while_it_lasts() -> None:
    said = "Failed to create pod sandbox: rpc error: code = Unknown desc = no network"
    sandbox = event("FailedCreatePodSandBox", said)
    placed = event("Scheduled", "Successfully assigned", at="2025-11-24T10:00:00Z", kind="Normal")
    found = waiting("ContainerCreating")
    assert waits(judged(found, sandbox, placed), "starting", "FailedCreatePodSandBox") == said
    assert waits(judged(found, placed), "starting", "Scheduled") == ""


@pytest.mark.parametrize(
    ("message", "hint"),
    [
        (
            "failed to create containerd task: failed to create shim task: OCI runtime create "
            "failed: runc create failed: unable to start container process: error during container "
            'init: exec: "python3": executable file not found in $PATH: unknown',
            "it has no python3 on its PATH",
        ),
        (
            "failed to create containerd task: failed to create shim task: OCI runtime create "
            "failed: runc create failed: unable to start container process: error during container "
            'init: mkdir cwd: chdir to cwd ("/root") set in config.json failed: permission denied: '
            "unknown",
            "set run_as_user, or workingDir",
        ),
        ("exec /usr/local/bin/python3: exec format error", "another architecture"),
    ],
)
def test_image_that_cannot_run_a_worker_is_an_error_at_once(message: str, hint: str) -> None:
    error = failed(judged(ended(128, "StartError", message)), ImageError, retry=False)
    assert hint in str(error)
    assert (error.reason, error.detail) == ("StartError", message)


def test_image_of_another_architecture_is_known_by_its_log() -> None:
    log = "exec /usr/local/bin/python3: exec format error\n"
    error = failed(judged(ended(255, "Error"), log_tail=log), ImageError, retry=False)
    assert "another architecture" in str(error)
    assert error.log_tail == log


@pytest.mark.parametrize(("code", "said"), [(1, "code 1"), (139, "signal 11"), (0, "code 0")])
def test_worker_that_ends_before_it_is_ready_is_an_error_with_its_log(code: int, said: str) -> None:
    verdict = judged(ended(code, "Error" if code else "Completed"), log_tail="SyntaxError")
    error = failed(verdict, WorkerStartError, retry=True)
    assert said in str(error)
    assert "Python 3.11 or newer" in str(error)
    assert (error.exit_code, error.log_tail) == (code, "SyntaxError")


def test_worker_that_ends_by_itself_later_is_lost() -> None:
    found = ended(139, "Error", phase="Running")  # a sidecar goes on
    error = failed(judged(found, ready=True), WorkerLostError, retry=True)
    assert "ended with code 139 (signal 11)" in str(error)


def test_init_container_that_fails_is_named() -> None:
    found = pod("Failed")
    state = {"terminated": {"exitCode": 3, "reason": "Error", "message": "no data"}}
    found["status"]["initContainerStatuses"] = [
        {"name": "first", "state": {"terminated": {"exitCode": 0}}},
        {"name": "fetch", "state": state},
    ]
    error = failed(judged(found), WorkerStartError, retry=True)
    assert "its init container 'fetch' ended with code 3" in str(error)
    assert error.detail == "no data"


# Jobs that end


@pytest.mark.parametrize(
    ("kind", "reason", "message"),
    [
        ("Failed", "DeadlineExceeded", "Job was active longer than specified deadline"),
        ("Failed", "FailedIndexes", "Job has failed indexes"),
        ("FailureTarget", "DeadlineExceeded", "Job was active longer than specified deadline"),
        ("Complete", "CompletionsReached", "Reached expected number of succeeded pods"),
    ],
)
def test_job_that_has_ended_starts_no_more_pods(kind: str, reason: str, message: str) -> None:
    found = job(condition(kind, "True", reason, message))
    error = failed(judged_job(found), WorkerStartError, retry=True)
    assert (error.reason, error.detail) == (reason, message)
    assert str(error).startswith("Job asyncrt-p has ended")
    assert judged_job(found, missing=0) is None


def test_deleted_job_starts_no_more_pods() -> None:
    error = failed(judged_job(job(), deleted=True), WorkerStartError, retry=True)
    assert "was deleted by somebody" in str(error)
    assert error.reason == "Deleted"


def test_suspended_job_is_waited_for() -> None:
    found = job(condition("Suspended", "True", "JobSuspended", "Job suspended"))
    verdict = judged_job(found)
    assert isinstance(verdict, Waiting)
    assert (verdict.what, verdict.count) == ("suspended", 3)
    assert "Kueue" in verdict.message


# What is remembered, and what is told


def test_nothing_is_remembered_of_pods_that_are_gone_or_done() -> None:
    memory: Memory = {}
    judged(waiting("ErrImagePull", NOT_FOUND), memory=memory)
    assert memory != {}
    judged(waiting("ErrImagePull", NOT_FOUND), memory=memory, deleted=True)
    assert memory == {}
    judged(waiting("ErrImagePull", NOT_FOUND), memory=memory)
    judged(ended(1, "Error"), memory=memory)
    assert memory == {}


def test_events_are_ordered_by_when_they_were_last_seen() -> None:
    found = waiting("ContainerCreating")
    old = event("FailedMount", 'secret "tls" not found', at="2025-11-24T10:00:05Z")
    new = event("Pulling", "Pulling image", kind="Normal")
    # As the scheduler and newer components write them: with fractions, and without lastTimestamp.
    new |= {"lastTimestamp": None, "eventTime": "2025-11-24T10:00:05.300000Z"}
    assert waits(judged(found, new, old), "starting", "Pulling") == "Pulling image"
    old["series"] = {"count": 3, "lastObservedTime": "2025-11-24T10:00:07.000000Z"}
    assert waits(judged(found, old, new), "starting", "FailedMount") == 'secret "tls" not found'
    bare = {"reason": "Pulled", "message": "", "type": "Normal"}
    assert waits(judged(found, old, bare), "starting", "FailedMount") == 'secret "tls" not found'


def test_summary_groups_what_is_waited_for() -> None:
    short = Waiting("pending", "Unschedulable", "0/1 nodes are available: 1 Insufficient cpu")
    pulling = Waiting("starting", "Pulling", f'Pulling image "{IMAGE}"')
    new = Waiting("starting", "", "")
    quota = Waiting("not created", "FailedCreate", "exceeded  quota:\n compute", 4)
    assert summary([short] * 3) == "3 pods pending: 0/1 nodes are available: 1 Insufficient cpu"
    assert summary([short, pulling, short, quota, new]) == (
        "4 pods not created: exceeded quota: compute; "
        "2 pods pending: 0/1 nodes are available: 1 Insufficient cpu; "
        f'1 pod starting: Pulling image "{IMAGE}"; 1 pod starting'
    )
    assert summary([]) == ""
    assert len(summary([Waiting("starting", "FailedMount", "x" * 5000)])) < 400

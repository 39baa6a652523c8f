#!/usr/bin/env bash
# Builds the Dockerfile and runs the image, without a Docker engine: tests/support/container_check.sh [work folder]
#
# Requires root on Debian 12 or a similar system, and
#   apt-get install -y --no-install-recommends podman runc catatonit mmdebstrap
# BASE_IMAGE is the image to build on. By default mmdebstrap creates a Debian with Python from the package sources of this
# machine, so that no image registry is needed. POD is the file of a Pod to run in addition.
# The work folder keeps the images for the next run; `podman` finds them through the two .conf files in it.
set -euo pipefail

PROJECT=$(cd "$(dirname "$0")/../.." && pwd)
WORK=${1:-${TMPDIR:-/tmp}/picture-trainer-containers}
IMAGE=localhost/picture-trainer
CALLER=12345 # a user without a name, as `--user $(id -u)` gives
mkdir -p "$WORK"

cat > "$WORK/containers.conf" <<'CONF'
[containers]
# podman's default limits (1048576) require CAP_SYS_RESOURCE
default_ulimits = ["nofile=1024:1024", "nproc=4096:4096"]
# no bridge and no iptables rules: the job needs only the loopback interface of its container
netns = "none"
[engine]
# Debian's crun 1.8 does not support hybrid cgroups
runtime = "runc"
cgroup_manager = "cgroupfs"
events_logger = "file"
CONF
printf '[storage]\ndriver = "overlay"\ngraphroot = "%s/store"\nrunroot = "%s/run"\n' "$WORK" "$WORK" > "$WORK/storage.conf"
export CONTAINERS_CONF="$WORK/containers.conf" CONTAINERS_STORAGE_CONF="$WORK/storage.conf"
unset STORAGE_DRIVER BUILDAH_ISOLATION

OUT=$(mktemp -d "$WORK/out.XXXXXX")
running=
cleanup() {
  if [ -n "$running" ]; then podman rm --force --time 0 "$running" > "$OUT/rm.log" 2>&1 || true; fi
  rm -rf "$OUT"
}
trap cleanup EXIT

report() { echo "$*" >&2; }
fail() {
  report "FAILED: $1"
  if [ -n "${2:-}" ]; then tail -n 40 "$2" >&2; fi
  exit 1
}

make_base() {
  mmdebstrap --quiet --variant=minbase --include=python3,python3-venv,ca-certificates bookworm - \
    /etc/apt/sources.list.d/debian.sources | podman import --quiet - localhost/base > /dev/null
}

build() { # build NAME FOLDER: reports the duration; the log is $OUT/NAME.log
  local start=$SECONDS mounts=() file
  # The access of this machine to the package index: mounted during the build, not part of the image.
  for file in /etc/ssl/certs/ca-certificates.crt /etc/pip.conf; do
    if [ -e "$file" ]; then mounts+=(--volume "$file:$file:ro"); fi
  done
  podman build --isolation chroot --layers --build-arg "BASE_IMAGE=$BASE_IMAGE" --build-arg VARIANT=cpu \
    "${mounts[@]}" --tag "$IMAGE" "$2" > "$OUT/$1.log" 2>&1 || fail "the image does not build" "$OUT/$1.log"
  report "$1: $((SECONDS - start)) s"
}

restricted() { # the arguments of podman for a run that can write to /tmp and to $OUT/$1, mounted as /job, only
  mkdir -p "$OUT/$1" && chown "$CALLER:$CALLER" "$OUT/$1"
  echo --read-only --tmpfs /tmp --cap-drop=ALL --security-opt no-new-privileges --memory 3g --pids-limit 512 \
    --user "$CALLER:$CALLER" --volume "$OUT/$1:/job"
}

expect() { # expect CODE FILE COMMAND...: runs the command with its output in FILE; fails on another exit code
  local code=0 expected=$1 file=$2
  shift 2
  "$@" > "$file" 2>&1 || code=$?
  if [ "$code" != "$expected" ]; then fail "exit code $code, expected $expected: $*" "$file"; fi
}

if [ -z "${BASE_IMAGE:-}" ]; then
  BASE_IMAGE=localhost/base
  podman image exists "$BASE_IMAGE" || { start=$SECONDS && make_base && report "base: $((SECONDS - start)) s"; }
fi
build image "$PROJECT"

# A code change: the same project with one more line. The layer with the packages must come from the cache.
mkdir "$OUT/changed" "$OUT/changed/deploy"
cp -a "$PROJECT"/{Dockerfile,.dockerignore,trainer} "$OUT/changed"
cp -a "$PROJECT"/deploy/{flags,image} "$OUT/changed/deploy/"
echo "# changed" >> "$OUT/changed/trainer/task.py"
build "image after a code change" "$OUT/changed"
if grep -q "Collecting" "$OUT/image after a code change.log"; then fail "a code change installs the packages again"; fi
build "unchanged image" "$PROJECT"

inspect() { podman image inspect "$IMAGE" --format "$1"; }
report "size: $(($(inspect '{{.Size}}') / 1000000)) MB"
[[ $(inspect '{{.Config.User}}') =~ ^[1-9][0-9]*:[1-9][0-9]*$ ]] || fail "the user is not a number above 0"
test "$(inspect '{{json .Config.Entrypoint}}')" = '["python3","-m","trainer.task"]' || fail "the entry point is not trainer.task"
for label in title description licenses version revision; do
  test -n "$(inspect "{{index .Config.Labels \"org.opencontainers.image.$label\"}}")" || fail "no label $label"
done
podman run --rm --entrypoint /bin/sh "$IMAGE" -c '
  for name in gcc cc make git; do if command -v $name; then echo "$name is in the image"; exit 1; fi; done
  for path in /app/tests /app/setup.py /build /opt/venv/bin/pip /root/.cache/pip; do
    if [ -e $path ]; then echo "$path is in the image"; exit 1; fi
  done
  if [ -w /app ] || [ -w /opt/venv ]; then echo "the user can write to the program"; exit 1; fi
' > "$OUT/contents.log" 2>&1 || fail "the image contains files that it must not contain" "$OUT/contents.log"

DEMO=(--data_dir=demo --job_dir=/job --weights=none --head_epochs=0 --image_size=32 --batch_size=16 --checkpoint_secs=1)
start=$SECONDS
read -ra run <<< "$(restricted finished)"
expect 0 "$OUT/finished.log" podman run --rm "${run[@]}" "$IMAGE" "${DEMO[@]}" --epochs=1
for name in metrics.json history.csv best.weights.h5 saved_model/saved_model.pb report/index.html; do
  test -s "$OUT/finished/$name" || fail "the job did not write $name" "$OUT/finished.log"
done
foreign_files=$(find "$OUT/finished" ! -user "$CALLER")
test -z "$foreign_files" || fail "files with another owner than the caller: $foreign_files"
report "demo, restricted, one epoch: $((SECONDS - start)) s"

# The second entry point, started as by Vertex AI for predictions: ready, a response, and exit code 0 on SIGTERM.
start=$SECONDS
read -ra run <<< "$(restricted finished)"
running=$(podman run --detach "${run[@]}" --env AIP_HTTP_PORT=8080 --env AIP_STORAGE_URI=/job/saved_model \
  --env AIP_PREDICT_ROUTE=/ask --entrypoint python3 "$IMAGE" -m trainer.serve)
image=$(find "$OUT/finished/demo_pictures" -name '*.jpg' -print -quit)
expect 0 "$OUT/served.log" podman exec "$running" python3 -c '
import base64, json, sys, time, urllib.request
for _ in range(600):
    try:
        names = json.load(urllib.request.urlopen("http://127.0.0.1:8080/health"))["class_names"]
        break
    except OSError:
        time.sleep(0.5)
image = base64.b64encode(open(sys.argv[1], "rb").read()).decode()
request = json.dumps({"instances": [{"bytes": {"b64": image}}, {"bytes": {"b64": "aGk="}}]}).encode()
good, bad = json.load(urllib.request.urlopen("http://127.0.0.1:8080/ask", request))["predictions"]
assert good["label"] in names and "not a JPEG" in bad["error"], (good, bad)
' "/job/${image#"$OUT/finished/"}"
podman kill --signal TERM "$running" > "$OUT/kill.log"
code=$(podman wait "$running")
podman logs "$running" > "$OUT/serve.log" 2>&1
podman rm "$running" > "$OUT/rm.log" && running=
test "$code" = 0 || fail "the server exited with $code on SIGTERM, expected 0" "$OUT/serve.log"
report "served, restricted: $((SECONDS - start)) s"

read -ra run <<< "$(restricted no-gpu)"
expect 2 "$OUT/no-gpu.log" podman run --rm "${run[@]}" "$IMAGE" "${DEMO[@]}" --epochs=1 --require_gpu
grep -q "^error: .*GPU" "$OUT/no-gpu.log" || fail "--require_gpu does not report the missing GPU" "$OUT/no-gpu.log"
if grep -q Traceback "$OUT/no-gpu.log"; then fail "--require_gpu ends in a traceback" "$OUT/no-gpu.log"; fi

# SIGTERM during the run, then the same command again: 143 and a checkpoint, then the other epochs, each once.
start=$SECONDS
read -ra run <<< "$(restricted stopped)"
running=$(podman run --detach "${run[@]}" "$IMAGE" "${DEMO[@]}" --epochs=3)
for ((i = 0; i < 1200; i++)); do
  if [ -s "$OUT/stopped/history.csv" ]; then break; fi
  if [ "$(podman inspect --format '{{.State.Running}}' "$running")" != true ]; then break; fi
  sleep 0.2
done
podman kill --signal TERM "$running" > "$OUT/kill.log" 2>&1 || true
code=$(podman wait "$running")
podman logs "$running" > "$OUT/stopped.log" 2>&1
podman rm "$running" > "$OUT/rm.log" && running=
test "$code" = 143 || fail "the job exited with $code on SIGTERM, expected 143" "$OUT/stopped.log"
compgen -G "$OUT/stopped/checkpoints/*" > /dev/null || fail "no checkpoint after SIGTERM" "$OUT/stopped.log"
test ! -e "$OUT/stopped/metrics.json" || fail "the job finished before SIGTERM" "$OUT/stopped.log"
expect 0 "$OUT/resumed.log" podman run --rm "${run[@]}" "$IMAGE" "${DEMO[@]}" --epochs=3
grep -q "Resuming from the checkpoint" "$OUT/resumed.log" || fail "the restart did not resume" "$OUT/resumed.log"
epochs=$(cut -d, -f1 "$OUT/stopped/history.csv" | tr -d '\r' | paste -sd' ')
test "$epochs" = "epoch 1 2 3" || fail "history.csv has '$epochs' after the restart, expected each epoch once" "$OUT/resumed.log"
report "stopped and resumed: $((SECONDS - start)) s"

if [ -n "${POD:-}" ]; then # the file of a Pod named trainer-pod, as for Kubernetes: runs restricted, exits with 0
  start=$SECONDS
  podman play kube --network none "$POD" > "$OUT/play.log" 2>&1 || fail "podman cannot run $POD" "$OUT/play.log"
  running=$(podman ps --all --quiet --filter name=trainer-pod-trainer)
  code=$(podman wait "$running")
  podman logs "$running" > "$OUT/pod.log" 2>&1
  context=$(podman inspect --format '{{.HostConfig.ReadonlyRootfs}} {{.Config.User}} {{.EffectiveCaps}}' "$running")
  podman play kube --down "$POD" > "$OUT/down.log" 2>&1 && running=
  podman volume prune --force > "$OUT/prune.log" # its emptyDirs, which otherwise remain
  test "$code" = 0 || fail "the pod exited with $code, expected 0" "$OUT/pod.log"
  test "$context" = "true 65532:65532 []" || fail "the pod ran as $context, expected read-only, 65532, no capabilities"
  report "pod: $((SECONDS - start)) s"
fi
report "all checks passed"

# shellcheck shell=bash disable=SC2154  # the variables are those of run.sh and conf/settings.sh
# Functions shared by run.sh's stages: settings, running commands, done markers, timing, and the reward server process.

log() { echo "run.sh: $*" >&2; }

die() {
  log "$*"
  exit 1
}

# require_tools: stop if a program is missing that run.sh, conf/ or scripts/*.sh call, or if it is not the GNU version and
# lacks an option that they use.
require_tools() {
  local tool missing=()
  local tools=(basename cat curl cut date dirname env git grep head mkdir mktemp paste realpath rm rmdir seq sha256sum sleep sort stat tail tr wc xargs)
  for tool in "${tools[@]}"; do [[ -n $(type -P "$tool") ]] || missing+=("$tool"); done
  [[ $(printf 'a\nb\n' | sed -E '/^a$/!Q' 2>/dev/null) == a ]] || missing+=("sed (GNU)")
  for tool in mv ln; do [[ $("$tool" --help 2>&1) == *-T* ]] || missing+=("$tool (GNU, with -T)"); done
  [[ $(df --help 2>&1) == *--output* ]] || missing+=("df (GNU, with --output)")
  ((${#missing[@]} == 0)) || {
    printf -v missing '%s, ' "${missing[@]}"
    die "tools are missing: ${missing%, }: install them, or set PATH (Debian: apt-get install coreutils curl git grep sed)"
  }
}

setting_names=()
declare -A setting_default setting_stages setting_kind setting_meaning setting_origin setting_marked

# setting NAME DEFAULT STAGES KIND MEANING: declare a setting; conf/settings.sh explains the arguments.
setting() {
  setting_names+=("$1")
  setting_default[$1]=$2 setting_stages[$1]=$3 setting_kind[$1]=$4 setting_meaning[$1]=$5
}

# is_set NAME: succeed if the setting has a value. An empty value counts if the setting may be empty.
is_set() { [[ -n ${!1-} || (-v $1 && ${setting_kind[$1]} == *\?) ]]; }

# mark ORIGIN: record ORIGIN for all settings that have got a value since the previous call.
mark() {
  local name
  for name in "${setting_names[@]}"; do
    [[ -n ${setting_origin[$name]-} ]] || ! is_set "$name" || setting_origin[$name]=$1 setting_marked[$name]=${!name}
  done
}

# give_defaults NAME...: set each setting that has no value to its default.
give_defaults() {
  local name value
  mark profile
  for name; do
    if ! is_set "$name"; then
      eval "value=\"${setting_default[$name]}\"" # a default may refer to other settings
      printf -v "$name" %s "$value"
      setting_origin[$name]=default setting_marked[$name]=$value
    fi
  done
}

# resolve NAME...: as give_defaults, and stop if a value is not allowed. A profile calls this for settings from which it
# computes others.
resolve() {
  give_defaults "$@"
  send_settings "$@" | "$base_python" -IS "$root/scripts/settings.py" validate || exit 1
}

# send_settings NAME...: print settings in the form that scripts/settings.py reads.
send_settings() {
  local name origin
  for name; do
    origin=${setting_origin[$name]}
    [[ ${!name} == "${setting_marked[$name]}" ]] || origin=profile # the profile changed the environment's value
    printf '%s\0' "$name" "${setting_stages[$name]}" "${setting_kind[$name]}" "${setting_meaning[$name]}" "$origin" "${!name}"
  done
}

# all_settings ACTION [OPTION...]: run an action of scripts/settings.py on all settings.
all_settings() { send_settings "${setting_names[@]}" | "$base_python" -IS "$root/scripts/settings.py" "$@"; }

# differences FILE STATE NAME...: print the differences between the state in FILE and STATE, ignoring the given names.
differences() { "$base_python" -IS "$root/scripts/settings.py" differences --old "$1" --new "$2" --ignore "${@:3}"; }

# print_only STAGE...: in a subshell, make stages print their commands. The recipe's folder, the user's environment and
# the settings on which the results of the given stages do not depend get fixed values. So do numbers, because equal
# numbers can be written in several ways, and total_steps, because it may grow: they are compared as settings only.
# shellcheck disable=SC2034 # run.sh's variables
print_only() {
  local name kind stage counts
  dry_run=1 root='<root>' PYTHONPATH='' server_pid=''
  unset CUDA_VISIBLE_DEVICES
  for name in "${setting_names[@]}"; do
    kind=${setting_kind[$name]} counts=0
    for stage; do [[ " ${setting_stages[$name]} " != *" $stage "* ]] || counts=1; done
    [[ $name != total_steps && $kind != number* && $kind != ints* ]] || counts=0
    ((counts == 0)) || continue
    case $kind in # any allowed value
    *\|*) printf -v "$name" %s "${kind%%|*}" ;;
    int* | number*) printf -v "$name" 1 ;;
    devices) printf -v "$name" cpu ;;
    *) printf -v "$name" %s "<$name>" ;;
    esac
  done
}

# checksum FILE: print the checksum of the state in FILE, or nothing if the file does not exist.
checksum() { [[ ! -f $1 ]] || head -n 1 "$1" | sha256sum | cut -c 1-16; }

# load_settings: declare the settings and set them from the environment, the recipe, the evaluation, the algorithm, the
# profile and the defaults.
load_settings() {
  local given=${profile:+yes}
  profile=${profile:-tiny}
  [[ -f $root/conf/$profile.sh && $profile != settings ]] || { log "no profile conf/$profile.sh" && usage; }
  # shellcheck source=conf/settings.sh
  source "$root/conf/settings.sh"
  unset recipe_args overrides # users cannot set these by variables
  mark environment
  [[ -n $given ]] || setting_origin[profile]=default
  recipe_verl_args=()
  load_recipe "${recipe-}"
  # shellcheck disable=SC2034 # read by name
  [[ ${#recipe_verl_args[@]} -eq 0 ]] || recipe_args=${recipe_verl_args[*]}
  mark recipe
  load_evaluation "${evaluation-}"
  mark evaluation
  load_algorithm "${algorithm-}"
  mark algorithm
  if ((${#verl_overrides[@]})); then
    # shellcheck disable=SC2034 # read by name
    overrides=${verl_overrides[*]}
    mark "command line"
  fi
  give_defaults profile recipe base_python exp_name exp_dir venv_root
  [[ $("$base_python" -IS -c 'print(1)' 2>&1) == 1 ]] || die "base_python=$base_python does not run: set base_python to Python 3.11 or 3.12"
  [[ $exp_dir == /* ]] || exp_dir=$root/$exp_dir
  setting_marked[exp_dir]=$exp_dir
  # shellcheck source=conf/tiny.sh
  source "$root/conf/$profile.sh"
  resolve "${setting_names[@]}"
}

# presets FOLDER: print the names of the files in a folder of conf/.
presets() {
  local names=("$root/conf/$1"/*.sh)
  names=("${names[@]##*/}")
  echo "${names[*]%.sh}"
}

# load_recipe NAME: load a published recipe's settings, if NAME is not empty. The environment's values take precedence.
load_recipe() {
  [[ -n $1 ]] || return 0
  [[ -f $root/conf/recipes/$1.sh ]] || die "recipe=$1 is unknown: choose one of $(presets recipes)"
  [[ $profile == cosyvoice2 ]] || die "recipe=$1 is for profile=cosyvoice2, not for profile=$profile"
  # shellcheck source=conf/recipes/mair-hub.sh
  source "$root/conf/recipes/$1.sh"
}

# load_evaluation NAME: load the sampling and the treatment of texts with which figures were published, if NAME is not
# empty. Values of the environment and of the recipe take precedence.
load_evaluation() {
  [[ -n $1 ]] || return 0
  [[ -f $root/conf/evaluations/$1.sh ]] || die "evaluation=$1 is unknown: choose one of $(presets evaluations)"
  # shellcheck source=conf/evaluations/mair-hub.sh
  source "$root/conf/evaluations/$1.sh"
}

# load_algorithm NAME: load an algorithm's settings. Those of the environment and of the recipe take precedence.
load_algorithm() {
  local name=${1:-${setting_default[algorithm]}}
  [[ -f $root/conf/algorithms/$name.sh ]] || die "algorithm=$name is unknown: choose one of $(presets algorithms)"
  # shellcheck source=conf/algorithms/dapo.sh
  source "$root/conf/algorithms/$name.sh"
}

# adapt_to_machine: work around properties of some machines (proxies, no home folder, long paths, other load) that would
# stop a run or slow it down.
adapt_to_machine() {
  bypass_proxies
  choose_home
  choose_cache
  choose_socket_folders
  # Ray starts its workers with niceness 15 by default. Any other load on the machine would then starve the training.
  export RAY_worker_niceness=${RAY_worker_niceness:-0}
}

# bypass_proxies: exclude this machine and the reward servers from HTTP proxies. Downloads still use the proxy.
bypass_proxies() {
  local hosts
  hosts=$({
    echo localhost 127.0.0.1 ::1
    hostname && hostname -I
    tr , ' ' <<<"$server_urls" | sed -E 's#[a-z]+://##g; s#[:/][^ ]*##g'
  } 2>/dev/null | tr -s ' ' '\n' | sort -u | paste -sd ,)
  export no_proxy=${no_proxy:-${NO_PROXY-}}
  no_proxy=${no_proxy:+$no_proxy,}$hosts
  export NO_PROXY=$no_proxy
}

# own_folder PATH: make a folder that only this user can access, or accept an existing one if this user owns it.
own_folder() { mkdir -m 700 "$1" 2>/dev/null || [[ -d $1 && ! -L $1 && -O $1 && -w $1 ]]; }

# why_not_writable FOLDER: print why nothing can be written into FOLDER, or into the existing folder in which it would be
# made; print nothing if it is writable. A test with [[ -w ]] is not enough: root passes it even for /proc.
why_not_writable() {
  local folder=$1 probe
  until [[ -e $folder || -L $folder ]]; do folder=$(dirname "$folder"); done
  if probe=$(LC_ALL=C mktemp -d "$folder/.tts-grpo-XXXXXX" 2>&1); then
    rmdir "$probe"
  else
    echo "$folder cannot be written to (${probe##*: })"
  fi
}

# folder_faults: print a line per folder of results that cannot be written to.
folder_faults() {
  local folder fault
  for folder in "$exp_dir" "$exp_dir"/{.done,data,sft_model,log,checkpoints,tensorboard,validation,eval}; do
    fault=$(why_not_writable "$folder")
    [[ -z $fault ]] || { echo "$fault: set exp_dir to a folder that can, or make it writable" && break; }
  done
  ((make_envs)) && [[ ! -f $venv_root/speech/.done || ! -f $venv_root/trainer/.done ]] || return 0
  fault=$(why_not_writable "$venv_root")
  [[ -z $fault ]] || echo "$fault: set venv_root to a folder that can, or make it writable"
}

# shared_memory_faults: print what is wrong with /dev/shm, if anything. Ray needs no space there: it has its object store
# in its temporary folder if /dev/shm is small.
shared_memory_faults() {
  local fault devices needed_mib free_mib remedy="mount a larger one (Docker: --shm-size=1g)"
  ((start <= 2 && stop >= 1)) || return 0
  fault=$(why_not_writable /dev/shm)
  [[ -d /dev/shm ]] || fault="/dev/shm is missing"
  if [[ -n $fault ]]; then
    echo "$fault, but the reward server and Ray need it: $remedy"
    return
  fi
  read -ra devices <<<"$server_devices"
  # PyTriton 0.7 takes 4 MiB for each process and for the model of validation audio; requests take a few MiB
  needed_mib=$((4 * (server_instances * ${#devices[@]} + 1) + 16))
  # NCCL's segments between GPUs; its guide recommends --shm-size=1g in place of Docker's 64 MiB
  [[ $train_device != cuda ]] || ((num_gpus == 1)) || ((needed_mib += 64 * num_gpus))
  free_mib=$(df -BM --output=avail /dev/shm | tail -n 1 | tr -dc 0-9)
  ((free_mib >= needed_mib)) || echo "/dev/shm has $free_mib MiB free, but $needed_mib are needed: $remedy, or lower server_instances"
}

# name_full_disks: after a failure, print which disks are full, because programs report it in many ways.
name_full_disks() {
  local folder free_mib
  for folder in "$exp_dir" "${TMPDIR:-/tmp}" /dev/shm; do
    free_mib=$(df -BM --output=avail "$folder" 2>/dev/null | tail -n 1 | tr -dc 0-9)
    [[ -z $free_mib ]] || ((free_mib >= 64)) ||
      log "the disk of $folder has only $free_mib MiB left, which may be the cause: free space, or use another disk (exp_dir, TMPDIR), and run the same command again"
  done
}

# choose_home: set HOME to a writable folder for caches if the user has none (containers, services).
choose_home() {
  [[ -z ${HOME-} || ! -d $HOME || -n $(why_not_writable "$HOME") ]] || return 0
  local home=${TMPDIR:-/tmp}/tts-grpo-home-$UID
  log "HOME (${HOME-unset}) is not a writable folder: using $home"
  own_folder "$home" || die "$home cannot be used: set HOME to a writable folder of yours"
  export HOME=$home
}

# choose_cache: set XDG_CACHE_HOME to a writable folder if the cache folder cannot be written to.
choose_cache() {
  local cache=${XDG_CACHE_HOME:-$HOME/.cache} fault other=${TMPDIR:-/tmp}/tts-grpo-cache-$UID
  fault=$(why_not_writable "$cache")
  [[ -n $fault ]] || return 0
  log "the cache folder $fault: using $other"
  own_folder "$other" || die "$other cannot be used: set XDG_CACHE_HOME to a writable folder of yours"
  export XDG_CACHE_HOME=$other
}

# too_long FOLDER BYTES: succeed if a Unix socket cannot have a path of that many bytes below FOLDER: 107 are allowed.
too_long() { (($(printf %s "$1" | wc -c) + $2 > 107)); }

# choose_socket_folders: replace folders whose paths are too long for the Unix sockets that programs make below them:
#   RAY_TMPDIR, else TMPDIR      /ray/session_2026-01-31_12-00-00_123456_<pid>/sockets/plasma_store (ray 2.60)
#   TMPDIR                       /torch-shm-dir-123456/manager.sock, /pymp-12345678/listener-12345678, vLLM's /<UUID>
#   PYTRITON_HOME, see PyTriton  /workspace_12345678/token2wav_asr_0_999-server.sock (pytriton 0.7); links are resolved
choose_socket_folders() {
  local ray=68 other=40 triton=51 home
  [[ -n ${TMPDIR-} ]] || unset TMPDIR # Ray would take an empty value for the working folder
  [[ -n ${RAY_TMPDIR-} ]] || unset RAY_TMPDIR
  if too_long "${TMPDIR-}" "$other" || { [[ -z ${RAY_TMPDIR-} ]] && too_long "${TMPDIR-}" "$ray"; }; then
    [[ -w /tmp ]] || die "TMPDIR=$TMPDIR is too long for the sockets of Ray: set TMPDIR to a folder whose path has at most $((107 - ray)) bytes"
    log "TMPDIR=$TMPDIR is too long for the sockets of Ray: using /tmp"
    export TMPDIR=/tmp
  fi
  if too_long "${RAY_TMPDIR-}" "$ray"; then
    log "RAY_TMPDIR=$RAY_TMPDIR is too long for the sockets of Ray: using ${TMPDIR:-/tmp}"
    ! too_long "${TMPDIR-}" "$ray" || die "TMPDIR=$TMPDIR is too long for the sockets of Ray: set RAY_TMPDIR to a folder whose path has at most $((107 - ray)) bytes"
    unset RAY_TMPDIR
  fi
  home=$(realpath -m "${PYTRITON_HOME:-${XDG_CACHE_HOME:-$HOME/.cache}/pytriton}")
  too_long "$home" "$triton" || [[ -n $(why_not_writable "$home") ]] || return 0
  [[ -z ${PYTRITON_HOME-} ]] || log "PYTRITON_HOME=$PYTRITON_HOME is too long for the sockets of PyTriton, or not writable: using ${TMPDIR:-/tmp}"
  export PYTRITON_HOME=${TMPDIR:-/tmp}/pytriton-$UID
  ! too_long "$(realpath -m "$PYTRITON_HOME")" "$triton" || PYTRITON_HOME=/tmp/pytriton-$UID
  own_folder "$PYTRITON_HOME" || die "$PYTRITON_HOME cannot be used: set PYTRITON_HOME to a folder whose path has at most $((107 - triton)) bytes"
}

# plain_path FOLDER: print FOLDER, or a link to it if its path needs quoting in a shell. Ray starts its workers by a
# shell command in which the path of Python is not quoted (ray 2.60, worker_pool.cc).
plain_path() {
  local links=${TMPDIR:-/tmp}/tts-grpo-links-$UID link
  if ((dry_run)) || [[ $1 != *[^A-Za-z0-9_./+-]* ]]; then
    echo "$1"
    return
  fi
  link=$links/$(sha256sum <<<"$1" | cut -c 1-16)
  own_folder "$links" || die "$links cannot be used: set venv_root to a path without spaces and special characters"
  ln -sfnT "$1" "$link"
  echo "$link"
}

# hydra TEXT: quote TEXT for veRL's command line, so that Hydra parses it back unchanged. Between single quotes, Hydra
# takes every character literally, except a quote and backslashes that stand before a quote or at the end
# (hydra/grammar/OverrideLexer.g4, 1.3).
hydra() {
  local quoted='' backslashes='' i
  for ((i = 0; i < ${#1}; i++)); do
    case ${1:i:1} in
    \\) backslashes+=\\ ;;
    \') quoted+=$backslashes$backslashes"\\'" backslashes='' ;;
    *) quoted+=$backslashes${1:i:1} backslashes='' ;;
    esac
  done
  printf "'%s'" "$quoted$backslashes$backslashes"
}

# run COMMAND...: run a command, or print it with --dry-run.
run() {
  if ((dry_run)); then
    printf '%q ' "$@"
    printf '\n'
  else
    "$@"
  fi
}

# run_long COMMAND...: as run, for commands that take minutes. The command runs in the background, because bash handles
# SIGTERM only after a command in the foreground has ended.
run_long() {
  if ((dry_run)); then
    run "$@"
  else
    "$@" &
    wait $!
  fi
}

# run_beside_server COMMAND...: as run_long, for the training. If the reward server that this run started ends first, the
# reason is written to the file that scripts/train.py watches, until the training has stopped.
run_beside_server() {
  if ((dry_run)) || [[ -z $server_pid ]]; then
    run_long "$@"
    return
  fi
  local training
  "$@" &
  training=$!
  while kill -0 "$training" 2>/dev/null; do
    kill -0 "$server_pid" 2>/dev/null ||
      echo "the reward server has ended: see $exp_dir/log/reward_server.log; the same command continues from the last checkpoint" >"$exp_dir/reward_failure"
    sleep 0.5
  done
  kill -0 "$server_pid" 2>/dev/null || show_end "$exp_dir/log/reward_server.log"
  wait "$training"
}

# in_background COMMAND...: as run, but in the background. wait_for_all: wait for all of these, and fail if one fails.
in_background() {
  if ((dry_run)); then
    run "$@"
  else
    "$@" &
    background_pids+=($!)
  fi
}

wait_for_all() {
  local pid status=0
  for pid in "${background_pids[@]}"; do wait "$pid" || status=1; done
  background_pids=()
  return "$status"
}

# need FILE STAGE: stop if FILE, which STAGE makes, is missing.
need() {
  ((dry_run)) || [[ -e $1 ]] || die "$1 is missing: run bash run.sh $2 $2 first"
}

# key NAME...: print a checksum of the names and values of variables.
key() {
  local name
  for name; do printf '%s=%s\n' "$name" "${!name}"; done | sha256sum | cut -c 1-16
}

# done_with STAGE STATE: succeed if the stage was finished with this state.
done_with() {
  ((dry_run == 0 && force == 0)) && [[ -f $exp_dir/.done/$1 && $(head -n 1 "$exp_dir/.done/$1") == "$2" ]]
}

# replace_file FILE: write standard input to FILE atomically: a kill or a full disk leaves the old file as it is.
replace_file() { cat >"$1.part" && mv "$1.part" "$1"; }

# mark_done STAGE STATE: record the state from which the stage's result was made, and the git commit, atomically.
mark_done() {
  ((dry_run)) && return
  mkdir -p "$exp_dir/.done"
  printf '%s\n' "$2" "commit $(git -C "$root" describe --always --dirty --abbrev=40 2>/dev/null || echo unknown)" |
    replace_file "$exp_dir/.done/$1"
}

# work_on RESULT: identify the result that the current stage makes, by any text. Runs with the same text, such as a
# resumed training, add up their times.
work_on() { worked_on=$(sha256sum <<<"$1" | cut -c 1-16); }

# record STAGE SECONDS: record the time of a stage's run for scripts/summarise.py, unless the stage was skipped.
record() {
  ((dry_run)) || [[ -z $worked_on ]] && return
  mkdir -p "$exp_dir"
  local times=$exp_dir/stage_seconds.jsonl
  {
    [[ ! -f $times ]] || cat "$times"
    printf '{"stage": %s, "seconds": %s, "result": "%s", "anew": %s}\n' "$1" "$2" "$worked_on" "$force"
  } | replace_file "$times"
}

server_ready() {
  curl --noproxy '*' --silent --fail --max-time 5 --output /dev/null "$1/v2/models/token2wav_asr/ready"
}

# stop PID: terminate a process that this run started and wait for it; kill it after 60 s.
stop() {
  kill "$1" 2>/dev/null || return 0
  local watch
  { sleep 60 && kill -9 "$1"; } >/dev/null 2>&1 &
  watch=$!
  wait "$1" 2>/dev/null || true
  kill "$watch" 2>/dev/null || true
}

# show_end LOG: print the last lines of a server's log, and before them its first errors, which are the cause. Triton and
# its processes print many more lines when they stop.
show_end() {
  local errors='(^|[[:space:]])([A-Za-z_]+\.)*([A-Za-z_]+Error|[A-Za-z_]*Exception|SystemExit)(:|$)|^E[0-9]{4} | (ERROR|CRITICAL|error): '
  errors=$(head -n -20 "$1" | grep -aE -m 5 "$errors") || true
  [[ -z $errors ]] || printf '%s\n' "its first errors:" "$errors" "its last lines:" >&2
  tail -n 20 "$1" >&2
}

# processes_of RUN: print the IDs of the processes that have TTS_GRPO_RUN=RUN in their environment.
processes_of() (
  unset TTS_GRPO_RUN # otherwise grep and cut would find themselves
  grep -lzxF "TTS_GRPO_RUN=$1" /proc/[0-9]*/environ 2>/dev/null | cut -d / -f 3 || true
)

# end_processes RUN: end all processes that a run has left behind, such as Triton and Ray's daemons, which outlive the
# process that started them if it is killed.
end_processes() {
  local signal pids i
  for signal in TERM KILL; do
    mapfile -t pids < <(processes_of "$1")
    ((${#pids[@]})) || return 0
    kill -s "$signal" "${pids[@]}" 2>/dev/null || true
    for ((i = 0; i < 25; i++)); do # 5 s
      [[ -n $(processes_of "$1") ]] || return 0
      sleep 0.2
    done
  done
}

# end_left_processes: end the processes of killed runs of this exp_dir. They would hold ports, GPUs and memory, and train
# into the same folder.
end_left_processes() {
  local run runs
  mapfile -t runs < <(grep -lzxF "TTS_GRPO_EXP_DIR=$exp_dir" /proc/[0-9]*/environ 2>/dev/null |
    xargs -r cat 2>/dev/null | tr '\0' '\n' | sed -n 's/^TTS_GRPO_RUN=//p' | sort -u)
  for run in "${runs[@]}"; do
    # the process of a run is run.sh, or the reward server for which it made way (stage 1 alone); a zombie has no command
    [[ $(tr '\0' ' ' 2>/dev/null <"/proc/$run/cmdline") != *@(run.sh|token2wav_asr_server.py)* ]] || continue
    log "run $run of $exp_dir was killed: ending its processes $(processes_of "$run" | paste -sd ' ' -)"
    end_processes "$run"
  done
}

# wait_for_ports: wait up to 20 s until no process listens on the reward server's ports: a server that has just been
# stopped needs seconds to end.
wait_for_ports() {
  local port i
  for port in "$http_port" "$grpc_port" "$metrics_port"; do
    for ((i = 0; i < 40; i++)); do
      (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null || break
      ((i)) || log "port $port is in use: waiting up to 20 s for the process to end"
      sleep 0.5
    done
  done
}

# start_server: start the reward server in the background and wait until it is ready.
start_server() {
  local server_log=$exp_dir/log/reward_server.log began status=0
  if ((dry_run)); then
    run "${server_command[@]}"
    return
  fi
  mkdir -p "$exp_dir/log"
  wait_for_ports
  ! server_ready "http://127.0.0.1:$http_port" || die "port $http_port already has a reward server: stop it, set http_port, or skip stage 1"
  began=$SECONDS
  "${server_command[@]}" >"$server_log" 2>&1 &
  server_pid=$!
  while ((SECONDS - began < server_timeout_s)); do
    if ! kill -0 "$server_pid" 2>/dev/null; then
      wait "$server_pid" || status=$?
      server_pid=
      show_end "$server_log"
      die "the reward server ended with status $status before it was ready: see the lines above, and the whole log in $server_log"
    fi
    if server_ready "http://127.0.0.1:$http_port"; then
      echo "reward server ready at http://$server_address:$http_port (log: $server_log)"
      return
    fi
    sleep 1
  done
  show_end "$server_log"
  die "the reward server was not ready within $server_timeout_s s: see the lines above, and the whole log in $server_log"
}

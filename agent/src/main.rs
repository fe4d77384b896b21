//! `blixard-agent`: makes everything ready, gives up what it does not need, serves the node.

use std::io::{self, IsTerminal, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::thread;

use blixard_agent::cgroup::{self, CgroupTree};
use blixard_agent::config::{Config, Settings};
use blixard_agent::guard::Guard;
use blixard_agent::host::{Host, Parts, sentence};
use blixard_agent::jail::Program;
use blixard_agent::ledger::Ledger;
use blixard_agent::server::{PLAN_FILE, Server};
use blixard_agent::store::Store;
use blixard_agent::vmm_link::Watch;
use blixard_agent::volume::file::FileVolumes;
use blixard_agent::{doctor, durable, lease, observe, privileges, reconcile, vmm_link};
use blixard_agent_api::request::FindingState;
use blixard_agent_api::{Finding, Generation, HostPlan};
use blixard_ipc::{Listener, MESSAGE_BYTES_MAX};
use clap::{Parser, Subcommand};
use nix::fcntl::{Flock, FlockArg};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use tracing_subscriber::EnvFilter;

/// Name of the agent's socket in the run folder.
const SOCKET: &str = "agent.sock";

/// The privileged hand of one Blixard node: runs the VMs of the plan that the node gives it.
///
/// Needs root, cgroup v2 and /dev/kvm. Listens on the socket that systemd passes, or on RUN/agent.sock.
#[derive(Debug, Parser)]
#[command(version)]
struct Options {
    /// TOML file with the same settings; the command line wins
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    #[command(flatten)]
    settings: Settings,
    #[command(subcommand)]
    command: Option<Task>,
}

#[derive(Debug, Subcommand)]
enum Task {
    /// Look at this host: what it has for VMs, and what to do where something is missing
    Doctor {
        /// One JSON array of findings
        #[arg(long)]
        json: bool,
    },
    /// Freeze what may run elsewhere when the lease of this host ends, also while the agent is dead; needs --cgroup
    Guard,
}

fn main() -> ExitCode {
    let options = Options::parse();
    let level = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    let colours = io::stderr().is_terminal();
    tracing_subscriber::fmt().with_env_filter(level).with_ansi(colours).with_writer(io::stderr).init();
    let config = match Config::new(options.settings, options.config.as_deref()) {
        Ok(config) => config,
        Err(error) => {
            tracing::error!("{}", sentence(&error));
            return ExitCode::from(2);
        }
    };
    let result = match options.command {
        Some(Task::Doctor { json }) => return examine(&config, json),
        Some(Task::Guard) => guard(&config),
        None => run(config),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            tracing::error!("{message}");
            ExitCode::FAILURE
        }
    }
}

fn examine(config: &Config, json: bool) -> ExitCode {
    let findings = doctor::examine(config);
    let text = if json { serde_json::to_string(&findings).unwrap_or_default() } else { table(&findings) };
    let worst = findings.iter().map(|finding| finding.state).max();
    match writeln!(io::stdout().lock(), "{text}") {
        Ok(()) if worst < Some(FindingState::Bad) => ExitCode::SUCCESS,
        _ => ExitCode::FAILURE,
    }
}

fn table(findings: &[Finding]) -> String {
    let line = |finding: &Finding| {
        let state = match finding.state {
            FindingState::Ok => "ok",
            FindingState::Warning => "warning",
            FindingState::Bad => "bad",
        };
        let fix = finding.fix.as_ref().map(|fix| format!("\n{:26}fix: {fix}", "")).unwrap_or_default();
        format!("{:<8}{:<18}{}{fix}", state, finding.check, finding.found)
    };
    findings.iter().map(line).collect::<Vec<_>>().join("\n")
}

fn run(config: Config) -> Result<(), String> {
    if !nix::unistd::geteuid().is_root() {
        return Err("the agent must run as root: it starts VMMs in namespaces and as other users".into());
    }
    let listener = passed_listener()?;
    folders(&config).map_err(|e| format!("cannot make the agent's folders: {e}"))?;
    // Held until the process ends, however it ends.
    let _only_one = lock(&config.state)?;
    let listener = match listener {
        Some(listener) => listener,
        None => own_listener(&config)?,
    };
    more_descriptors();
    let cgroups = open_cgroups(&config);
    privileges::reduce().map_err(|e| format!("cannot give up capabilities: {e}"))?;

    let (ledger, known) = Ledger::open(&config.state.join("ledger")).map_err(|e| sentence(&e))?;
    let program = Program::load(&config.vmm).map_err(|e| sentence(&e));
    let parts = Parts {
        ledger,
        store: Store::open(&config.state.join("blobs")).map_err(|e| sentence(&e))?,
        volumes: Box::new(FileVolumes::open(&config.state).map_err(|e| sentence(&e))?),
        cgroups,
        program,
        watch: Watch::new().map_err(|e| format!("cannot watch VMMs: {e}"))?,
        boot_id: boot_id()?,
        memory_mib: memory_mib()?,
        instance: random()?,
        config,
    };
    let host = Arc::new(Host::new(parts));
    tell_problems(&host);
    let mut planned = Generation::default();
    if let Some(plan) = stored_plan(&host.config.state)? {
        tracing::info!(generation = plan.generation.0, vms = plan.vms.len(), "stored plan");
        planned = plan.generation;
        host.core().set_plan(plan);
    }
    let lease = lease::stored(&host.config.run, &host.config.state, &host.boot_id);
    host.core().lease = lease.map(|lease| lease::extended(lease, &host.config.node_lease, planned));
    observe::look(&host, known)?;
    let spawn = |name: &str, task: Box<dyn FnOnce() + Send>| {
        let spawned = thread::Builder::new().name(name.into()).spawn(task);
        spawned.map(|_| ()).map_err(|e| format!("cannot start a thread: {e}"))
    };
    let watching = Arc::clone(&host);
    spawn("watch", Box::new(move || vmm_link::run(&watching)))?;
    let leasing = Arc::clone(&host);
    spawn("lease", Box::new(move || lease::run(&leasing)))?;
    let working = Arc::clone(&host);
    spawn(
        "reconcile",
        Box::new(move || {
            if let Err(error) = reconcile::run(&working) {
                tracing::error!(%error, "cannot start workers");
                std::process::exit(1);
            }
        }),
    )?;
    tell_ready();
    tracing::info!(node_uid = host.config.node_uid, "serving");
    Server::new(host).serve(&listener).map_err(|e| sentence(&e))
}

fn tell_ready() {
    // Without systemd there is nobody to tell.
    if let Err(error) = sd_notify::notify(&[sd_notify::NotifyState::Ready]) {
        tracing::debug!(%error, "cannot tell systemd that this is ready");
    }
}

fn guard(config: &Config) -> Result<(), String> {
    // Its own cgroup, which the agent takes by default, is not the agent's.
    let Some(root) = &config.cgroup else {
        return Err("the guard freezes cgroups: say which with --cgroup, as for the agent".into());
    };
    std::fs::create_dir_all(&config.run).map_err(|e| format!("cannot make {}: {e}", config.run.display()))?;
    let guard = Guard::new(config, CgroupTree::of_others(root), boot_id()?).map_err(|e| sentence(&e))?;
    let ended = guard.run(|| {
        tell_ready();
        tracing::info!(cgroup = %root.display(), "watching the lease");
    });
    match ended {
        Err(error) => Err(sentence(&error)),
        Ok(never) => match never {},
    }
}

fn tell_problems(host: &Host) {
    let cgroups = match &host.cgroups {
        Err(reason) => Some(format!("VMs cannot start: {reason}")),
        Ok(None) => Some("VMs run without limits (--no-cgroup)".into()),
        Ok(Some(_)) => None,
    };
    host.problem("cgroups", cgroups);
    let program = host.program.as_ref().err().map(|reason| format!("VMs cannot start: {reason}"));
    host.problem("program", program);
}

fn folders(config: &Config) -> io::Result<()> {
    durable::folder(&config.state)?;
    durable::folder(&config.state.join("vm"))?;
    // Others find sockets here; what they may use is up to the mode of each.
    std::fs::create_dir_all(&config.run)?;
    durable::folder(&config.run.join("vm"))?;
    durable::folder(&config.run.join("jail"))
}

fn lock(state: &Path) -> Result<Flock<std::fs::File>, String> {
    let path = state.join("lock");
    let file = std::fs::File::create(&path).map_err(|e| format!("cannot open {}: {e}", path.display()))?;
    Flock::lock(file, FlockArg::LockExclusiveNonblock)
        .map_err(|_| format!("another agent works in {}", state.display()))
}

fn own_listener(config: &Config) -> Result<Listener, String> {
    let path = config.run.join(SOCKET);
    // We hold the lock: what lies there is of an agent that is gone.
    durable::remove_file(&path).map_err(|e| format!("cannot remove {}: {e}", path.display()))?;
    let listener = Listener::bind(&path, 0o600).map_err(|e| sentence(&e))?;
    let owner = Some(nix::unistd::Uid::from_raw(config.node_uid));
    nix::unistd::chown(&path, owner, None)
        .map_err(|e| format!("cannot give away {}: {e}", path.display()))?;
    Ok(listener)
}

/// The socket that systemd passes (`sd_listen_fds(3)`): exactly one, number 3.
fn passed_listener() -> Result<Option<Listener>, String> {
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u32>().ok());
    if number("LISTEN_PID") != Some(std::process::id()) {
        return Ok(None);
    }
    if number("LISTEN_FDS") != Some(1) {
        return Err("systemd must pass exactly one socket".into());
    }
    // SAFETY: LISTEN_PID is this process, so descriptor 3 was opened for it, and nothing else has taken it over yet.
    let fd = unsafe { OwnedFd::from_raw_fd(3) };
    let close = nix::fcntl::FcntlArg::F_SETFD(nix::fcntl::FdFlag::FD_CLOEXEC);
    nix::fcntl::fcntl(&fd, close).map_err(|_| "descriptor 3 is not open".to_owned())?;
    let kind = nix::sys::socket::getsockopt(&fd, nix::sys::socket::sockopt::SockType);
    if kind != Ok(nix::sys::socket::SockType::SeqPacket) {
        return Err(format!("descriptor {} is no socket for sequential packets", fd.as_raw_fd()));
    }
    Ok(Some(fd.into()))
}

/// Each VM takes two descriptors of the agent.
fn more_descriptors() {
    if let Ok((_, hard)) = getrlimit(Resource::RLIMIT_NOFILE)
        && let Err(errno) = setrlimit(Resource::RLIMIT_NOFILE, hard, hard)
    {
        tracing::warn!(%errno, "cannot raise the number of descriptors");
    }
}

fn open_cgroups(config: &Config) -> Result<Option<CgroupTree>, String> {
    if config.no_cgroup {
        return Ok(None);
    }
    let root = config.cgroup.clone().map_or_else(cgroup::own, Ok).map_err(|e| sentence(&e))?;
    CgroupTree::open(&root).map(Some).map_err(|e| sentence(&e))
}

fn stored_plan(state: &Path) -> Result<Option<HostPlan>, String> {
    let path = state.join(PLAN_FILE);
    let text =
        durable::read_bounded(&path, MESSAGE_BYTES_MAX).map_err(|e| format!("{}: {e}", path.display()))?;
    let parse = |text: Vec<u8>| serde_json::from_slice(&text).map_err(|e| format!("{}: {e}", path.display()));
    text.map(parse).transpose()
}

fn boot_id() -> Result<String, String> {
    blixard_agent_api::held::boot_id().map_err(|e| format!("cannot tell this boot: {e}"))
}

fn memory_mib() -> Result<u64, String> {
    let path = "/proc/meminfo";
    let text = std::fs::read_to_string(path).map_err(|e| format!("{path}: {e}"))?;
    let total = text.lines().find_map(|line| line.strip_prefix("MemTotal:"));
    let kib = total.and_then(|rest| rest.trim().strip_suffix("kB")?.trim().parse::<u64>().ok());
    kib.map(|kib| kib / 1024).ok_or_else(|| format!("{path} has no MemTotal"))
}

fn random() -> Result<u64, String> {
    let mut bytes = [0; 8];
    let mut file = std::fs::File::open("/dev/urandom").map_err(|e| format!("/dev/urandom: {e}"))?;
    io::Read::read_exact(&mut file, &mut bytes).map_err(|e| format!("/dev/urandom: {e}"))?;
    // 0 stands for none.
    Ok(u64::from_le_bytes(bytes).max(1))
}

//! `blixard-init`: PID 1 of a guest. This file is the guest's life in order; each step has a file of its own.
//!
//! * [`modules`], [`root`], [`devices`]: kernel modules, disks, mounts
//! * [`names`], [`network`] over [`netlink`]: host name, addresses, routes
//! * [`link`] over [`vsock`]: what the host is told and what it says; [`identity`]: a copy becomes somebody else
//! * [`command`] with [`users`], [`children`], [`exec`]: programs; [`health`]: whether the workload does its work
//! * [`power`]: the end

mod children;
mod command;
mod console;
mod devices;
mod exec;
mod health;
mod identity;
mod link;
mod modules;
mod names;
mod netlink;
mod network;
mod power;
mod root;
mod sys;
mod users;
mod vsock;

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::process::{ExitCode, Stdio};
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::time::{Duration, Instant};

use blixard_vmm_api::config::ConfigError;
use blixard_vmm_api::guest::{CONFIG_PATH, Command, GuestConfig, LinkRecord, WorkloadExit};
use nix::sys::resource::{Resource, setrlimit};

use children::Children;
use command::{NotStarted, Surroundings};
use devices::Announcements;
use exec::Executor;
use health::Checks;
use link::Link;

/// Most bytes of the configuration: the workload's words, and room for all else.
const CONFIG_MAX: u64 = 1 << 20;
/// How long the workload may take to end after SIGTERM.
const STOP_GRACE: Duration = Duration::from_secs(10);
/// Open files a process may have: what container engines give. Init itself needs several per exec stream.
const OPEN_FILES: u64 = 1 << 20;
/// The module after which the host can be reached.
const VSOCK_MODULE: &str = "vmw_vsock_virtio_transport.ko";

/// What keeps init from doing its work.
#[derive(Debug, thiserror::Error)]
enum Problem {
    #[error("starting a thread")]
    Thread(#[source] io::Error),
    #[error("reading {CONFIG_PATH}")]
    NoConfig(#[source] io::Error),
    #[error("{CONFIG_PATH}")]
    BadConfig(#[source] serde_json::Error),
    #[error("{CONFIG_PATH}")]
    Config(#[from] ConfigError),
    #[error("module order")]
    Modules(#[from] modules::OrderError),
    #[error("listening for the kernel's device announcements")]
    Announcements(#[source] nix::Error),
    #[error("root file system")]
    Root(#[from] root::RootError),
    #[error("network")]
    Network(#[from] network::NetworkError),
    #[error("workload")]
    Workload(#[from] NotStarted),
}

/// What happens after the start.
#[derive(Debug, Clone, Copy)]
enum Event {
    Stop,
    WorkloadEnded(WorkloadExit),
}

/// What has to be ended in order. Each part is there as soon as it was begun.
#[derive(Default)]
struct Guest {
    children: Option<Arc<Children>>,
    link: Option<Arc<Link>>,
    executor: Option<Arc<Executor>>,
    checks: Option<Arc<Checks>>,
    volume: Option<root::Volume>,
}

fn main() -> ExitCode {
    if std::process::id() != 1 {
        console::line("this is PID 1 of a guest and does nothing elsewhere");
        return ExitCode::from(2);
    }
    power::off_on_panic();
    let mut guest = Guest::default();
    if let Err(problem) = live(&mut guest) {
        power::complain(&guest, &console::chain(&problem));
        if let (Problem::Workload(refusal), Some(link)) = (&problem, &guest.link) {
            link.tell(LinkRecord::WorkloadExited(refusal.exit()));
        }
    }
    power::off(&guest)
}

/// From the first mount to the end of the workload.
fn live(guest: &mut Guest) -> Result<(), Problem> {
    let children = Children::start().map_err(Problem::Thread)?;
    guest.children = Some(Arc::clone(&children));
    root::mount_first()?;
    // A kernel with a lower limit keeps it.
    let _lower = setrlimit(Resource::RLIMIT_NOFILE, OPEN_FILES, OPEN_FILES);
    let (send, events) = mpsc::channel();
    load_modules(guest, &send)?;
    let config = read_config()?;

    let announcements = Announcements::listen().map_err(Problem::Announcements)?;
    if let Some(root) = &config.root {
        guest.volume = root::enter(root, &announcements)?;
    }
    root::mount_rest(|minor| console::line(&console::chain(minor)))?;
    if let Err(error) = nix::unistd::sethostname(&config.hostname) {
        console::line(&format!("host name: {error}"));
    }
    for failed in names::write(&config, Path::new("/etc")) {
        console::line(&failed);
    }
    network::set_up(&config.nics, &announcements)?;

    let executor = Executor::new(Arc::clone(&children));
    if let Err(error) = vsock::serve_exec(Arc::clone(&executor)) {
        console::line(&format!("no exec streams: {error}"));
    }
    guest.executor = Some(executor);
    let is_shell = config.workload.is_none();
    let pid = start_workload(&children, config.workload, send)?;
    if let (Some(check), Some(link)) = (config.health, &guest.link) {
        let link = Arc::clone(link);
        let tell = move |health| link.tell(LinkRecord::Health(health));
        let checks = Checks::start(check, Arc::clone(&children), tell);
        guest.checks = Some(checks.map_err(Problem::Thread)?);
    }
    if let Some(link) = &guest.link {
        link.tell(LinkRecord::Ready);
    }
    let exit = until_end(&children, pid, is_shell, &events);
    if let Some(link) = &guest.link {
        link.tell(LinkRecord::WorkloadExited(exit));
    }
    Ok(())
}

/// Loads the modules and begins the guest link as soon as they allow it.
fn load_modules(guest: &mut Guest, send: &Sender<Event>) -> Result<(), Problem> {
    let directory = Path::new("/modules");
    let order = std::fs::read_to_string(directory.join("order")).unwrap_or_default();
    let names = modules::parse_order(&order);
    let start = || {
        let link = Link::start(vsock::connect_link, send.clone(), || Event::Stop);
        link.map(Arc::new).map_err(Problem::Thread)
    };
    for name in names.as_deref().unwrap_or(&[]) {
        // What needs this module says so itself.
        if let Err(error) = modules::load(directory, name) {
            console::line(&format!("module {name}: {error}"));
        }
        if *name == VSOCK_MODULE {
            guest.link = Some(start()?);
        }
    }
    if guest.link.is_none() {
        guest.link = Some(start()?);
    }
    names?;
    Ok(())
}

fn read_config() -> Result<GuestConfig, Problem> {
    let mut text = vec![];
    let file = File::open(CONFIG_PATH).map_err(Problem::NoConfig)?;
    file.take(CONFIG_MAX).read_to_end(&mut text).map_err(Problem::NoConfig)?;
    let config: GuestConfig = serde_json::from_slice(&text).map_err(Problem::BadConfig)?;
    config.validate()?;
    Ok(config)
}

/// The workload, or a shell: the first of these that exists.
fn shell() -> Result<Command, NotStarted> {
    let found = ["/bin/sh", "/bin/bash"].into_iter().find(|path| Path::new(path).exists());
    let reason = "no command was given, and the image has neither /bin/sh nor /bin/bash";
    let shell = found.ok_or_else(|| NotStarted { code: 127, reason: reason.into() })?;
    Ok(Command { args: vec![shell.into()], ..Command::default() })
}

fn start_workload(
    children: &Children,
    workload: Option<Command>,
    send: Sender<Event>,
) -> Result<i32, NotStarted> {
    let workload = workload.map_or_else(shell, Ok)?;
    let program = workload.args.first().map_or("", String::as_str);
    let console = File::options().read(true).write(true).custom_flags(libc::O_NOCTTY).open("/dev/console");
    let surroundings = Surroundings { terminal: console.is_ok().then_some("linux"), make_directory: true };
    let (mut command, identity) = command::prepare(&workload, surroundings)?;
    match console {
        Ok(console) => {
            // So that a user other than root can open /dev/stdout; what was opened already works without it.
            let _still_root = std::os::unix::fs::fchown(&console, Some(identity.uid), None);
            let copy = || console.try_clone().map(Stdio::from).unwrap_or_else(|_| Stdio::null());
            command.stdin(copy()).stdout(copy()).stderr(copy());
        }
        Err(_no_console) => {
            command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        }
    }
    let on_exit = Box::new(move |exit| {
        // The receiver lives as long as init.
        let _gone = send.send(Event::WorkloadEnded(exit));
    });
    let started = children.spawn(&mut command, on_exit);
    Ok(started.map_err(|error| NotStarted::from_spawn(program, &error))?.pid)
}

/// Waits for the end of the workload, which the host may ask for.
fn until_end(children: &Children, pid: i32, is_shell: bool, events: &Receiver<Event>) -> WorkloadExit {
    let mut deadline = None;
    loop {
        let event = match deadline {
            None => events.recv().map_err(|_| RecvTimeoutError::Disconnected),
            Some(end) => events.recv_timeout(Instant::saturating_duration_since(&end, Instant::now())),
        };
        match event {
            Ok(Event::WorkloadEnded(exit)) => return exit,
            Ok(Event::Stop) if deadline.is_some() => {}
            Ok(Event::Stop) => {
                children.signal(pid, libc::SIGTERM);
                if is_shell {
                    // Interactive shells ignore SIGTERM.
                    children.signal(pid, libc::SIGHUP);
                }
                deadline = Some(Instant::now() + STOP_GRACE);
            }
            Err(RecvTimeoutError::Timeout) => {
                children.signal(pid, libc::SIGKILL);
                deadline = None;
            }
            // Cannot be: the closure that tells of the end holds a sender.
            Err(RecvTimeoutError::Disconnected) => return WorkloadExit::Signal(9),
        }
    }
}

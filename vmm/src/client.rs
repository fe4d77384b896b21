//! What people and benchmarks ask a running VM on its control socket: `blixard-vmm snapshot`, `fork` and the plain requests.

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use blixard_vmm::kvm::Vm;
use blixard_vmm::passing;
use blixard_vmm_api::control::{FromVmm, MESSAGE_BYTES_MAX, Reply, Request};
use blixard_vmm_api::cpu::CpuBaseline;
use blixard_vmm_api::snapshot::SnapshotKind;

use crate::front_end::{Options, Snapshots};

/// Longest wait for an answer.
const PATIENCE: Duration = Duration::from_secs(600);

/// A connection to a control socket.
pub struct Client(OwnedFd);

impl Client {
    /// Connects to the socket at `path`.
    ///
    /// # Errors
    /// There is none.
    pub fn connect(path: &str) -> io::Result<Self> {
        let mut address = libc::sockaddr_un { sun_family: 1, sun_path: [0; 108] };
        if path.len() >= address.sun_path.len() {
            return Err(io::ErrorKind::InvalidFilename.into());
        }
        for (to, from) in address.sun_path.iter_mut().zip(path.bytes()) {
            *to = from.cast_signed();
        }
        // SAFETY: no pointers are involved.
        let fd = unsafe { libc::socket(libc::AF_UNIX, libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC, 0) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor was just made and nobody else owns it.
        let socket = unsafe { OwnedFd::from_raw_fd(fd) };
        let size = libc::socklen_t::try_from(size_of::<libc::sockaddr_un>()).unwrap_or(0);
        // SAFETY: the pointer is to an address of that size.
        match unsafe { libc::connect(socket.as_raw_fd(), (&raw const address).cast(), size) } {
            0 => Ok(Self(socket)),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// Asks, with descriptors beside the request, and waits for the answer.
    ///
    /// # Errors
    /// The VM is gone or does not answer.
    pub fn ask(&self, request: &Request, beside: &[RawFd]) -> io::Result<(Reply, Vec<OwnedFd>)> {
        let bytes = serde_json::to_vec(request).map_err(io::Error::other)?;
        if !passing::send(&self.0, &bytes, beside) {
            return Err(io::Error::last_os_error());
        }
        let end = Instant::now() + PATIENCE;
        let mut buffer = vec![0; MESSAGE_BYTES_MAX];
        loop {
            let left = end.saturating_duration_since(Instant::now()).as_millis();
            let mut ready = libc::pollfd { fd: self.0.as_raw_fd(), events: libc::POLLIN, revents: 0 };
            // SAFETY: the pointer is to one entry.
            let count = unsafe { libc::poll(&raw mut ready, 1, i32::try_from(left).unwrap_or(i32::MAX)) };
            if count == 0 {
                return Err(io::ErrorKind::TimedOut.into());
            }
            let Some(received) = passing::receive(&self.0, &mut buffer)? else { continue };
            let text = buffer.get(..received.length).filter(|text| !text.is_empty());
            let text = text.ok_or(io::ErrorKind::ConnectionReset)?;
            if let FromVmm::Reply(reply) = serde_json::from_slice(text).map_err(io::Error::other)? {
                return Ok((reply, received.descriptors));
            }
        }
    }
}

/// Asks one thing and prints the answer as JSON.
fn tell(to: &mut dyn Write, path: &str, request: &Request, files: &[File]) -> Result<(), String> {
    let client = Client::connect(path).map_err(|error| format!("{path}: {error}"))?;
    let beside: Vec<RawFd> = files.iter().map(AsRawFd::as_raw_fd).collect();
    let (reply, _) = client.ask(request, &beside).map_err(|error| format!("{path}: {error}"))?;
    if let Reply::Refused { reason } = reply {
        return Err(reason);
    }
    let text = serde_json::to_string(&reply).map_err(|error| error.to_string())?;
    writeln!(to, "{text}").map_err(|error| error.to_string())
}

fn create(path: &str) -> Result<File, String> {
    let opened = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path);
    opened.map_err(|error| format!("{path}: {error}"))
}

/// Does the words behind the program's name, if they are for a client.
///
/// # Errors
/// What went wrong, for people.
pub fn run(words: &[&str], to: &mut dyn Write) -> Option<Result<(), String>> {
    let mut plain = |request| tell(to, words.get(1).copied().unwrap_or_default(), &request, &[]);
    Some(match words {
        ["pause", _] => plain(Request::Pause),
        ["resume", _] => plain(Request::Resume),
        ["status", _] => plain(Request::Status),
        ["stats", _] => plain(Request::Stats),
        ["kill", _] => plain(Request::Kill),
        ["snapshot", control, state, memory, kind @ ..] if matches!(kind, [] | ["--diff"]) => {
            let kind = if kind.is_empty() { SnapshotKind::Full } else { SnapshotKind::Diff };
            create(state)
                .and_then(|state| Ok([state, create(memory)?]))
                .and_then(|files| tell(to, control, &Request::Snapshot(kind), &files))
        }
        ["working-set", control, file] => {
            create(file).and_then(|file| tell(to, control, &Request::WorkingSet, &[file]))
        }
        ["cpu-baseline", files @ ..] => baseline(to, files),
        ["fork", control, count, rest @ ..] => match (count.parse(), Options::parse_for_fork(rest)) {
            (Ok(count), Ok(options)) => fork(to, control, count, &options),
            (Err(_), _) => Err(format!("fork: {count} is no number of children")),
            (_, Err(problem)) => Err(problem),
        },
        _ => return None,
    })
}

/// Prints what this host offers its guests, or what all hosts have whose answers are in `files`.
fn baseline(to: &mut dyn Write, files: &[&str]) -> Result<(), String> {
    let mut common: Option<CpuBaseline> = None;
    for path in files {
        let text = std::fs::read_to_string(path).map_err(|error| format!("{path}: {error}"))?;
        let one: CpuBaseline = serde_json::from_str(&text).map_err(|error| format!("{path}: {error}"))?;
        let both = common.map_or(Ok(one.clone()), |common| common.intersect(&one));
        common = Some(both.map_err(|error| format!("{path}: {error}"))?);
    }
    let answer = common.map_or_else(host_baseline, Ok)?;
    let text = serde_json::to_string(&answer).map_err(|error| error.to_string())?;
    writeln!(to, "{text}").map_err(|error| error.to_string())
}

fn host_baseline() -> Result<CpuBaseline, String> {
    let kvm = OpenOptions::new().read(true).write(true).open("/dev/kvm");
    let kvm = kvm.map_err(|error| format!("/dev/kvm: {error}"))?;
    let baseline = Vm::new(kvm.into()).and_then(|vm| {
        let template = vm.cpuid(1)?;
        let has = template.has_arch_capabilities();
        let arch_capabilities = if has { vm.arch_capabilities()? } else { None };
        Ok(CpuBaseline { arch_capabilities, ..template.baseline() })
    });
    baseline.map_err(|error| blixard_vmm::chain(&error))
}

/// Forks the VM at `control` and starts `count` children, then waits for their end.
fn fork(to: &mut dyn Write, control: &str, count: usize, options: &Options) -> Result<(), String> {
    let client = Client::connect(control).map_err(|error| format!("{control}: {error}"))?;
    let asked = client.ask(&Request::Fork, &[]).map_err(|error| format!("{control}: {error}"))?;
    let (made, files) = match asked {
        (Reply::Forked(made), files) => (made, files),
        (Reply::Refused { reason }, _) => return Err(reason),
        (other, _) => return Err(format!("{other:?} instead of a fork")),
    };
    let text = serde_json::to_string(&made).map_err(|error| error.to_string())?;
    writeln!(to, "{text}").map_err(|error| error.to_string())?;
    let mut children = vec![];
    for number in 0..count {
        let start = Instant::now();
        let child = child(&files, &options.for_child(number))?;
        let took = start.elapsed().as_micros();
        writeln!(to, "child {number}: process {}, started in {took} us", child.id())
            .map_err(|error| error.to_string())?;
        children.push(child);
    }
    for mut child in children {
        // A child that cannot be waited for has ended otherwise.
        let _ = child.wait();
    }
    Ok(())
}

/// State and memory of the fork come first, then those of what it is based on; a configuration has them the other way round.
fn snapshots(files: &[OwnedFd]) -> io::Result<Snapshots> {
    let mut pairs = vec![];
    for pair in files.chunks(2) {
        if let [state, memory] = pair {
            pairs.push((state.try_clone()?, memory.try_clone()?));
        }
    }
    pairs.reverse();
    Ok(pairs)
}

fn child(files: &[OwnedFd], options: &Options) -> Result<Child, String> {
    let problem = |error: io::Error| format!("start a child: {error}");
    let config =
        options.open_with(snapshots(files).map_err(problem)?).map_err(|reason| reason.to_string())?;
    let text = serde_json::to_vec(&config).map_err(|error| error.to_string())?;
    let mut file = blixard_vmm::memory::memfd(c"config", 0).map_err(problem)?;
    file.write_all(&text).and_then(|()| file.rewind()).map_err(problem)?;
    let numbers: Vec<RawFd> = config.descriptors.values().copied().chain([file.as_raw_fd()]).collect();
    for number in &numbers {
        // SAFETY: no pointers are involved; the descriptor is open.
        if unsafe { libc::fcntl(*number, libc::F_SETFD, 0) } != 0 {
            return Err(problem(io::Error::last_os_error()));
        }
    }
    let program = std::env::current_exe().map_err(problem)?;
    let number = file.as_raw_fd().to_string();
    let started = Command::new(program).args(["--config-fd", &number]).stdin(Stdio::null()).spawn();
    for number in config.descriptors.into_values() {
        // SAFETY: the configuration owns these descriptors, and the child has them now.
        drop(unsafe { OwnedFd::from_raw_fd(number) });
    }
    started.map_err(problem)
}

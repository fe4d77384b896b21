//! One VMM process of a test: started as a user or an agent starts it, with its seccomp filters on.

use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;
use std::time::Duration;

use blixard_vmm::passing;
use blixard_vmm::probe::{self, Answer};
use blixard_vmm_api::control::{FromVmm, MESSAGE_BYTES_MAX, Reply, Request, Status};
use tempfile::TempDir;

use crate::code::Guest;

/// Longest that a VM of a test may live.
const LIMIT: Duration = Duration::from_secs(60);

/// True when this machine runs small guests. Otherwise one line says that the tests are skipped, and why.
pub fn possible() -> bool {
    static POSSIBLE: OnceLock<bool> = OnceLock::new();
    *POSSIBLE.get_or_init(|| match probe::probe() {
        Answer::NoKvm { reason } => {
            // Not by println, which the harness hides for tests that pass.
            let _ = writeln!(io::stderr(), "skipped: tests with guests: no kvm ({reason})");
            false
        }
        _ => true,
    })
}

/// Lets strace write down what the VMM asks of the kernel, when `BLIXARD_STRACE` names a folder for it (`tests/syscalls.sh`).
fn traced(command: Command) -> Command {
    static NUMBER: AtomicU32 = AtomicU32::new(0);
    let Some(folder) = std::env::var_os("BLIXARD_STRACE") else { return command };
    let file = Path::new(&folder).join(format!("{}.trace", NUMBER.fetch_add(1, Ordering::Relaxed)));
    let mut strace = Command::new("strace");
    // The tracer is a grandchild: the VMM keeps its place as our child.
    strace.args(["-D", "-f", "-n", "-qq", "-e", "raw=!prctl", "-e", "signal=none", "-o"]).arg(file);
    strace.arg("--").arg(command.get_program()).args(command.get_args());
    strace
}

/// A child that does not outlive a test that fails.
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        // When it was waited for, nothing happens.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A running VMM.
pub struct Vm {
    child: Process,
    directory: TempDir,
    output: thread::JoinHandle<String>,
    problems: thread::JoinHandle<String>,
    printed: Receiver<u8>,
    over: Sender<()>,
    /// What is typed.
    pub stdin: Option<ChildStdin>,
}

/// How a VMM ended.
#[derive(Debug, PartialEq, Eq)]
pub struct Ended {
    /// Exit code; none when a signal ended it.
    pub code: Option<i32>,
    /// What the guest printed.
    pub output: String,
    /// What the VMM said.
    pub problems: String,
}

impl Vm {
    /// Runs `guest` with more arguments; `DIR` in them is a fresh directory.
    pub fn run(guest: Guest, arguments: &[&str]) -> Self {
        Self::run_file(&guest.elf(), arguments)
    }

    /// Runs a kernel with this content.
    pub fn run_file(kernel: &[u8], arguments: &[&str]) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("kernel");
        std::fs::write(&path, kernel).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_blixard-vmm"));
        command.args(["run", "--kernel"]).arg(path);
        let place = directory.path().to_str().unwrap();
        command.args(arguments.iter().map(|a| a.replace("DIR", place)));
        Self::spawn(command, directory)
    }

    /// Runs without a kernel.
    pub fn run_without_kernel(arguments: &[&str]) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_blixard-vmm"));
        let place = directory.path().to_str().unwrap();
        command.arg("run").args(arguments.iter().map(|a| a.replace("DIR", place)));
        Self::spawn(command, directory)
    }

    /// Starts `command`.
    pub fn spawn(command: Command, directory: TempDir) -> Self {
        let mut command = traced(command);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let (mut stdout, mut stderr) = (child.stdout.take().unwrap(), child.stderr.take().unwrap());
        let (sender, printed) = channel();
        let output = thread::spawn(move || {
            let (mut all, mut part) = (vec![], [0; 4096]);
            while let Ok(count @ 1..) = stdout.read(&mut part) {
                all.extend_from_slice(&part[..count]);
                for byte in &part[..count] {
                    let _ = sender.send(*byte);
                }
            }
            String::from_utf8_lossy(&all).into_owned()
        });
        let problems = thread::spawn(move || {
            let mut all = String::new();
            let _ = stderr.read_to_string(&mut all);
            all
        });
        let (over, ended) = channel();
        let process = child.id();
        thread::spawn(move || {
            if ended.recv_timeout(LIMIT) == Err(std::sync::mpsc::RecvTimeoutError::Timeout) {
                // SAFETY: no pointers are involved; the child was not waited for, so the number is still its.
                unsafe { libc::kill(process.cast_signed(), libc::SIGKILL) };
            }
        });
        let stdin = child.stdin.take();
        Self { child: Process(child), directory, output, problems, printed, over, stdin }
    }

    /// A path in the directory of this VM.
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Number of the process.
    pub fn process(&self) -> u32 {
        self.child.0.id()
    }

    /// Waits until the guest has printed this byte.
    pub fn wait_for(&self, byte: u8) {
        loop {
            match self.printed.recv_timeout(LIMIT) {
                Ok(printed) if printed == byte => return,
                Ok(_) => {}
                Err(error) => panic!("the guest did not print {:?}: {error}", char::from(byte)),
            }
        }
    }

    /// Waits for the end.
    pub fn end(mut self) -> Ended {
        let status = self.child.0.wait().unwrap();
        let _ = self.over.send(());
        let (output, problems) = (self.output.join().unwrap(), self.problems.join().unwrap());
        Ended { code: status.code(), output, problems }
    }
}

impl Vm {
    /// Connects to the control socket, which the VM was given as `DIR/control`, as soon as it is there.
    pub fn control(&self) -> Control {
        self.try_control().expect("the VM has ended")
    }

    /// Waits until the control socket is there; none when the VM has ended before.
    pub fn try_control(&self) -> Option<Control> {
        loop {
            if let Ok(socket) = connect(&self.path("control")) {
                return Some(Control(socket));
            }
            let mut info = std::mem::MaybeUninit::<libc::siginfo_t>::zeroed();
            let flags = libc::WEXITED | libc::WNOHANG | libc::WNOWAIT;
            // SAFETY: the pointer is to a structure that the call fills; the child stays to be waited for.
            let found = unsafe { libc::waitid(libc::P_PID, self.child.0.id(), info.as_mut_ptr(), flags) };
            // SAFETY: zeros are a valid structure, and the call filled it or left it.
            let info = unsafe { info.assume_init() };
            // SAFETY: the kernel fills this field for `waitid`, and zeros are a value of it.
            let pid = unsafe { info.si_pid() };
            if found == 0 && pid != 0 {
                return None;
            }
            thread::yield_now();
        }
    }
}

/// A connection to a control socket.
pub struct Control(OwnedFd);

/// A listening SEQPACKET socket.
pub fn listen(path: &Path) -> OwnedFd {
    // SAFETY: no pointers are involved.
    let fd = unsafe { libc::socket(libc::AF_UNIX, libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC, 0) };
    assert!(fd >= 0);
    // SAFETY: the descriptor was just made and nobody else owns it.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    let address = address(path);
    let size = size_of::<libc::sockaddr_un>() as u32;
    // SAFETY: the pointer is to an address of that size.
    assert_eq!(unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), size) }, 0);
    // SAFETY: no pointers are involved.
    assert_eq!(unsafe { libc::listen(socket.as_raw_fd(), 16) }, 0);
    socket
}

fn address(path: &Path) -> libc::sockaddr_un {
    let mut address = libc::sockaddr_un { sun_family: 1, sun_path: [0; 108] };
    for (to, from) in address.sun_path.iter_mut().zip(path.as_os_str().as_bytes()) {
        *to = from.cast_signed();
    }
    address
}

fn connect(path: &Path) -> io::Result<OwnedFd> {
    // SAFETY: no pointers are involved.
    let fd = unsafe { libc::socket(libc::AF_UNIX, libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC, 0) };
    assert!(fd >= 0);
    // SAFETY: the descriptor was just made and nobody else owns it.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    let address = address(path);
    let size = size_of::<libc::sockaddr_un>() as u32;
    // SAFETY: the pointer is to an address of that size.
    match unsafe { libc::connect(socket.as_raw_fd(), (&raw const address).cast(), size) } {
        0 => Ok(socket),
        _ => Err(io::Error::last_os_error()),
    }
}

impl Control {
    /// Sends bytes as one datagram.
    pub fn send(&self, bytes: &[u8]) {
        assert!(self.try_send(bytes), "{}", io::Error::last_os_error());
    }

    /// The same; false when the VMM has ended.
    fn try_send(&self, bytes: &[u8]) -> bool {
        // SAFETY: pointer and length are those of a slice.
        let sent =
            unsafe { libc::send(self.0.as_raw_fd(), bytes.as_ptr().cast(), bytes.len(), libc::MSG_NOSIGNAL) };
        sent == bytes.len().cast_signed()
    }

    /// The next message; none when the connection has ended.
    pub fn receive(&self) -> Option<FromVmm> {
        let mut bytes = vec![0; MESSAGE_BYTES_MAX];
        // SAFETY: pointer and length are those of the buffer.
        let got = unsafe { libc::recv(self.0.as_raw_fd(), bytes.as_mut_ptr().cast(), bytes.len(), 0) };
        let count = usize::try_from(got).unwrap_or(0);
        (count > 0).then(|| serde_json::from_slice(&bytes[..count]).unwrap())
    }

    /// Asks and gets the answer.
    pub fn ask(&self, request: &Request) -> Reply {
        self.try_ask(request).expect("a reply")
    }

    /// Asks and gets the answer; none when the VMM ends instead.
    pub fn try_ask(&self, request: &Request) -> Option<Reply> {
        if !self.try_send(&serde_json::to_vec(request).unwrap()) {
            return None;
        }
        match self.receive()? {
            FromVmm::Reply(reply) => Some(reply),
            other => panic!("{other:?} instead of a reply"),
        }
    }

    /// Asks with descriptors beside the request, and gets the answer with those beside it.
    pub fn ask_with(&self, request: &Request, beside: &[RawFd]) -> (Reply, Vec<OwnedFd>) {
        assert!(passing::send(&self.0, &serde_json::to_vec(request).unwrap(), beside));
        let mut bytes = vec![0; MESSAGE_BYTES_MAX];
        let mut ready = libc::pollfd { fd: self.0.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: the pointer is to one entry.
        assert_eq!(unsafe { libc::poll(&raw mut ready, 1, LIMIT.as_millis() as i32) }, 1);
        let received = passing::receive(&self.0, &mut bytes).unwrap().unwrap();
        match serde_json::from_slice(&bytes[..received.length]).unwrap() {
            FromVmm::Reply(reply) => (reply, received.descriptors),
            other => panic!("{other:?} instead of a reply"),
        }
    }

    /// How the VM is.
    pub fn status(&self) -> Status {
        match self.ask(&Request::Status) {
            Reply::Status(status) => status,
            other => panic!("{other:?} instead of a status"),
        }
    }

    /// Bytes the guest has printed.
    pub fn printed(&self) -> u64 {
        match self.ask(&Request::Stats) {
            Reply::Stats(stats) => stats["console.printed_bytes"],
            other => panic!("{other:?} instead of counters"),
        }
    }
}

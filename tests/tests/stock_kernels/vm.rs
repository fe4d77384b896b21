//! A VM of the developer front end: its process, its control socket, commands in its guest.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use blixard_vmm_api::control::{Event, FromVmm, MESSAGE_BYTES_MAX, Reply, Request, Status};
use blixard_vmm_api::guest::frame::{self, ExecRequest, Frame};
use blixard_vmm_api::guest::{self, EXEC_PORT, WorkloadExit};
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, UnixAddr, connect, recv, send, socket};
use nix::sys::socket::{setsockopt, sockopt};
use nix::sys::time::TimeVal;

use crate::host::{Net, PROGRAMS};

/// Longest wait for anything a VM does. Emulated processors are slow.
const PATIENCE: Duration = Duration::from_secs(120);

/// A VM; it is killed when it is dropped.
pub struct Vm {
    process: Child,
    control: PathBuf,
    vsock: PathBuf,
    console: PathBuf,
}

impl Vm {
    /// Starts `blixard-vmm WORDS` in `net`; its files are called `folder/name.…`. Sockets of a fork get `suffix`.
    pub fn start(net: &Net, folder: &Path, name: &str, words: &[&str], suffix: &str) -> Self {
        let file = |what: &str| folder.join(format!("{name}.{what}"));
        let console = file("console");
        let out = File::create(&console).unwrap();
        let vsock = format!("{},3", file("vsock").display());
        let sockets = ["--control", file("control").to_str().unwrap(), "--vsock", &vsock].map(str::to_owned);
        let process = net
            .command(&format!("{PROGRAMS}/blixard-vmm"), words)
            .args(sockets)
            .stdin(Stdio::null())
            .stdout(out.try_clone().unwrap())
            .stderr(out)
            .spawn()
            .unwrap();
        let at = |what| folder.join(format!("{name}.{what}{suffix}"));
        Self { process, control: at("control"), vsock: at("vsock"), console }
    }

    /// The control socket.
    pub fn control(&self) -> &str {
        self.control.to_str().unwrap()
    }

    fn connect(&self) -> OwnedFd {
        let end = Instant::now() + PATIENCE;
        loop {
            let fd = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None).unwrap();
            let address = UnixAddr::new(&self.control).unwrap();
            match connect(fd.as_raw_fd(), &address) {
                Ok(()) => {
                    let seconds = PATIENCE.as_secs().try_into().unwrap();
                    setsockopt(&fd, sockopt::ReceiveTimeout, &TimeVal::new(seconds, 0)).unwrap();
                    return fd;
                }
                // The process has not made it yet, of which it gives no other sign.
                Err(_) if Instant::now() < end => std::thread::sleep(Duration::from_millis(5)),
                Err(error) => panic!("{}: {error}\n{}", self.control.display(), self.said()),
            }
        }
    }

    fn receive(&self, fd: &OwnedFd) -> FromVmm {
        let mut bytes = vec![0; MESSAGE_BYTES_MAX];
        let length = recv(fd.as_raw_fd(), &mut bytes, MsgFlags::empty());
        let length = length.unwrap_or_else(|e| panic!("{}: {e}\n{}", self.control.display(), self.said()));
        assert_ne!(length, 0, "the VM has ended:\n{}", self.said());
        serde_json::from_slice(&bytes[..length]).unwrap()
    }

    fn send(&self, fd: &OwnedFd, request: &Request) {
        send(fd.as_raw_fd(), &serde_json::to_vec(request).unwrap(), MsgFlags::MSG_NOSIGNAL).unwrap();
    }

    /// Asks one thing.
    pub fn ask(&self, request: &Request) -> Reply {
        let fd = self.connect();
        self.send(&fd, request);
        match self.receive(&fd) {
            FromVmm::Reply(Reply::Refused { reason }) => panic!("{request:?}: {reason}"),
            FromVmm::Reply(reply) => reply,
            FromVmm::Event(event) => panic!("{event:?} without a subscription"),
        }
    }

    /// All counters.
    pub fn stats(&self) -> BTreeMap<String, u64> {
        let Reply::Stats(stats) = self.ask(&Request::Stats) else { panic!("no counters") };
        stats
    }

    /// Waits until init has reached the host, as it does at boot and again after a restore, and is ready.
    pub fn ready(&self) {
        let fd = self.connect();
        self.send(&fd, &Request::Subscribe);
        loop {
            let status: Status = match self.receive(&fd) {
                FromVmm::Reply(Reply::Status(status)) | FromVmm::Event(Event::Changed(status)) => status,
                other => panic!("{other:?}\n{}", self.said()),
            };
            assert_eq!(status.guest_problem, None);
            if status.guest_ready && status.times.init_start_us.is_some() {
                return;
            }
        }
    }

    /// Begins a shell script in the guest.
    pub fn begin(&self, script: &str) -> Exec {
        let mut stream = UnixStream::connect(&self.vsock).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.write_all(format!("CONNECT {EXEC_PORT}\n").as_bytes()).unwrap();
        let mut line = vec![];
        while line.last() != Some(&b'\n') {
            let mut byte = [0];
            stream.read_exact(&mut byte).unwrap_or_else(|e| panic!("{script}: {e}\n{}", self.said()));
            line.extend(byte);
        }
        assert!(line.starts_with(b"OK "), "{}", String::from_utf8_lossy(&line));
        let args = ["sh", "-ec", script].map(str::to_owned).to_vec();
        let command = guest::Command { args, ..guest::Command::default() };
        let mut exec = Exec { script: script.into(), stream, out: vec![], err: vec![], ended: None };
        exec.send(&Frame::Start(ExecRequest { command, terminal: None, stdin: true }));
        exec
    }

    /// Runs a shell script in the guest, which must succeed; its output.
    pub fn exec(&self, script: &str) -> String {
        self.exec_with(script, &[])
    }

    /// The same with `input` as its standard input.
    pub fn exec_with(&self, script: &str, input: &[u8]) -> String {
        let mut exec = self.begin(script);
        for part in input.chunks(frame::PAYLOAD_MAX) {
            exec.write(part);
        }
        exec.end()
    }

    /// Waits for its end; its exit code.
    pub fn ends(mut self) -> i32 {
        let end = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.process.try_wait().unwrap() {
                return status.code().unwrap_or(255);
            }
            assert!(Instant::now() < end, "it does not end:\n{}", self.said());
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// The end of what it printed, and where its threads are.
    pub fn said(&self) -> String {
        let said = std::fs::read(&self.console).unwrap_or_default();
        let said = String::from_utf8_lossy(&said[said.len().saturating_sub(6000)..]).into_owned();
        let stacks =
            format!("cd /proc/{}/task; for t in *; do cat $t/comm $t/stack; done", self.process.id());
        let stacks = Command::new("sh").args(["-c", &stacks]).output().unwrap();
        said + &String::from_utf8_lossy(&stacks.stdout)
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        // For a child of a fork the process is the one that waits for it.
        let control = self.control.clone();
        let kill = [&format!("{PROGRAMS}/blixard-vmm"), "kill"];
        let _ = Command::new("timeout").arg("10").args(kill).arg(control).output();
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// A command that runs in a guest.
pub struct Exec {
    script: String,
    stream: UnixStream,
    out: Vec<u8>,
    err: Vec<u8>,
    ended: Option<WorkloadExit>,
}

impl Exec {
    fn send(&mut self, frame: &Frame) {
        self.stream.write_all(&frame.encode(|request| serde_json::to_vec(request).ok()).unwrap()).unwrap();
    }

    /// Gives it more input.
    pub fn write(&mut self, bytes: &[u8]) {
        self.send(&Frame::Stdin(bytes.to_vec()));
    }

    fn receive(&mut self) {
        let mut header = [0; frame::HEADER];
        let script = self.script.clone();
        let fail = |error: std::io::Error| panic!("{script}: {error}");
        self.stream.read_exact(&mut header).unwrap_or_else(fail);
        let (kind, length) = frame::decode_header(header).unwrap();
        let mut payload = vec![0; length];
        self.stream.read_exact(&mut payload).unwrap();
        match Frame::decode(kind, payload, |_| None).unwrap() {
            Frame::Stdout(bytes) => self.out.extend(bytes),
            Frame::Stderr(bytes) => self.err.extend(bytes),
            Frame::Exit(exit) => self.ended = Some(exit),
            other => panic!("{script}: {other:?}"),
        }
    }

    /// Waits for `length` bytes of output and takes all there is.
    pub fn read(&mut self, length: usize) -> Vec<u8> {
        while self.out.len() < length {
            self.receive();
        }
        std::mem::take(&mut self.out)
    }

    /// Ends its input and waits for its end, which must be a good one; its output.
    pub fn end(mut self) -> String {
        self.write(&[]);
        while self.ended.is_none() {
            self.receive();
        }
        let (out, err) = (String::from_utf8_lossy(&self.out), String::from_utf8_lossy(&self.err));
        assert_eq!(self.ended, Some(WorkloadExit::Code(0)), "{}\n{out}\n{err}", self.script);
        out.into_owned()
    }
}

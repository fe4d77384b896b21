//! The control channel of a host: one `ssh` that stays, with a shell at its far end, and further sessions over
//! the same connection.

use crate::leash::{self, Leash, Running};
use crate::{programs, qemu, shell};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{ChildStdin, ChildStdout, Command, Stdio};
use std::time::Duration;

/// More than any answer of a setup script.
const MAX_OUTPUT: u64 = 1 << 20;
/// Printed by the far shell when it is there, and after each script together with its exit code.
const MARK: &str = "blixard-rig-mark";

/// What can go wrong.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// `ssh` could not be started, or everything was stopped.
    #[error("cannot start ssh")]
    Start(#[source] leash::Error),
    /// The host itself failed.
    #[error("the host failed")]
    Host(#[source] qemu::Error),
    /// The host ended before its ssh server answered.
    #[error("the host has ended: {0}")]
    HostEnded(String),
    /// The connection failed in the middle.
    #[error("lost the connection to {host}: {log}")]
    Lost {
        /// Name of the host.
        host: String,
        /// Its last words.
        log: String,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// A script of the rig failed in the host.
    #[error("preparing {host} failed with exit code {code}: {output}")]
    Script {
        /// Name of the host.
        host: String,
        /// Exit code.
        code: String,
        /// What it printed.
        output: String,
    },
}

/// Where to connect and with what.
pub struct Address {
    port: u16,
    key: PathBuf,
    socket: PathBuf,
}

impl Address {
    /// The control connection of a host whose image is in this folder.
    pub fn of(host: &mut qemu::Host, image: &Path) -> Result<Self, Error> {
        let port = host.control_port().map_err(Error::Host)?;
        Ok(Self { port, key: image.join("key"), socket: host.folder().join("ssh") })
    }

    fn ssh(&self, options: &[&str]) -> Command {
        let mut command = programs::command("ssh");
        // No configuration of the user, no memory of host keys: each host is new and has the same key.
        command.args(["-F", "none", "-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null"]);
        command.args(["-o", "LogLevel=ERROR", "-o", "BatchMode=yes", "-S"]).arg(&self.socket).args(options);
        command.arg("root@127.0.0.1");
        command
    }

    fn connect(&self, leash: &Leash) -> Result<Running, Error> {
        let port = self.port.to_string();
        let mut command = self.ssh(&[
            "-M",
            "-T",
            "-p",
            &port,
            "-i",
            &self.key.to_string_lossy(),
            "-o",
            "IdentitiesOnly=yes",
            // The default exchange is post-quantum and takes a second under emulation.
            "-o",
            "KexAlgorithms=curve25519-sha256",
            "-o",
            "ConnectTimeout=30",
            // Notices a host that has rebooted or hangs; patient, because a loaded machine is slow.
            "-o",
            "ServerAliveInterval=5",
            "-o",
            "ServerAliveCountMax=60",
        ]);
        command.arg(format!("echo {MARK}; exec sh"));
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
        leash.start(&mut command).map_err(Error::Start)
    }

    /// A further session, for the command of the user. Only over the existing connection: without it ssh would
    /// try to reach this machine itself.
    pub fn session(&self, tty: bool, script: &str) -> Command {
        let tty = if tty { "-tt" } else { "-T" };
        let mut command = self.ssh(&[tty, "-o", "ControlMaster=no", "-o", "ProxyCommand=false"]);
        command.arg(script);
        command
    }
}

/// The shell at the far end.
pub struct Shell {
    host: String,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
    process: Running,
}

impl Shell {
    /// Connects, again and again until the host's ssh server answers.
    pub fn open(host: &mut qemu::Host, address: &Address, leash: &Leash) -> Result<Self, Error> {
        loop {
            let mut process = address.connect(leash)?;
            let streams = process.streams();
            let (Some(input), Some(output)) = (streams.stdin.take(), streams.stdout.take()) else {
                continue; // both were asked for as pipes
            };
            let mut shell = Self { host: host.name(), input, output: BufReader::new(output), process };
            if shell.read_to_mark().is_ok() {
                return Ok(shell);
            }
            leash.check().map_err(Error::Start)?;
            if host.ended() {
                return Err(Error::HostEnded(host.last_words()));
            }
            std::thread::sleep(Duration::from_millis(100)); // while booting nothing announces the server
        }
    }

    /// Starts a script; several hosts can work at the same time.
    pub fn begin(&mut self, host: &qemu::Host, script: &str) -> Result<(), Error> {
        // A shell of its own, so that `exit` in it ends only itself.
        let line = format!("sh -ec {} </dev/null 2>&1; echo {MARK} $?\n", shell::quote(script));
        self.input.write_all(line.as_bytes()).map_err(|source| self.lost(host, source))
    }

    /// Waits for its end and answers with what it printed.
    pub fn end(&mut self, host: &qemu::Host) -> Result<String, Error> {
        let (output, code) = self.read_to_mark().map_err(|source| self.lost(host, source))?;
        if code == "0" { Ok(output) } else { Err(Error::Script { host: self.host.clone(), code, output }) }
    }

    /// Runs a script.
    pub fn run(&mut self, host: &qemu::Host, script: &str) -> Result<String, Error> {
        self.begin(host, script)?;
        self.end(host)
    }

    /// Leaves the far shell and waits until the connection is closed.
    pub fn close(self) -> Result<(), Error> {
        let Self { input, output, mut process, .. } = self;
        drop((input, output));
        process.wait().map(drop).map_err(Error::Start)
    }

    fn lost(&self, host: &qemu::Host, source: io::Error) -> Error {
        Error::Lost { host: self.host.clone(), log: host.last_words(), source }
    }

    fn read_to_mark(&mut self) -> io::Result<(String, String)> {
        let mut text = String::new();
        let mut limited = self.output.by_ref().take(MAX_OUTPUT);
        loop {
            let start = text.len();
            if limited.read_line(&mut text)? == 0 {
                return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the far shell has ended"));
            }
            let code =
                text.get(start..).and_then(|line| line.strip_prefix(MARK)).map(|c| c.trim().to_owned());
            if let Some(code) = code {
                text.truncate(start);
                return Ok((text, code));
            }
        }
    }
}

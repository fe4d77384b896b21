//! One node in the foreground (`blixard dev`) and the commands a user would type.
//!
//! A harness may give up loudly: every failure of the surroundings is a failed test.
#![expect(clippy::unwrap_used, clippy::panic, reason = "test harness: failing is its job")]

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

/// A running node with its own state and sockets. Dropping it stops it and its VMs.
pub struct Host {
    programs: PathBuf,
    folder: tempfile::TempDir,
    dev: Child,
}

/// What a command answered.
#[derive(Debug)]
pub struct Answer {
    /// Exit code; 255 when a signal ended it.
    pub code: i32,
    /// Standard output.
    pub out: String,
    /// Standard error.
    pub err: String,
}

impl Answer {
    /// The answer of a command that must succeed.
    pub fn good(self) -> String {
        assert_eq!(self.code, 0, "{self:?}");
        self.out
    }

    /// Standard output as JSON, of a command that must succeed.
    pub fn json(self) -> serde_json::Value {
        let out = self.good();
        serde_json::from_str(&out).unwrap_or_else(|e| panic!("{e}: {out}"))
    }
}

impl From<Output> for Answer {
    fn from(output: Output) -> Self {
        Self {
            code: output.status.code().unwrap_or(255),
            out: String::from_utf8_lossy(&output.stdout).into_owned(),
            err: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }
}

impl Host {
    /// Starts a node with the programs in `programs` and waits until it says that it is ready.
    pub fn start(programs: &Path) -> Self {
        let folder = tempfile::tempdir_in("/var/tmp").unwrap();
        let mut dev = Command::new(programs.join("blixard"))
            .args(["dev", "--no-kernel"])
            .arg("--state")
            .arg(folder.path().join("state"))
            .arg("--run")
            .arg(folder.path().join("run"))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(fs::File::create(folder.path().join("log")).unwrap())
            .spawn()
            .unwrap();
        // Other users (the node's) must reach their folders below.
        fs::set_permissions(folder.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        let mut lines = BufReader::new(dev.stdout.take().unwrap()).lines();
        let ready = lines.any(|line| line.is_ok_and(|l| l.contains("ready")));
        let host = Self { programs: programs.into(), folder, dev };
        assert!(ready, "the node did not become ready:\n{}", host.log());
        // Somebody has to read what it prints later, or it would block.
        std::thread::spawn(move || lines.for_each(drop));
        host
    }

    /// What the node's processes logged.
    pub fn log(&self) -> String {
        fs::read_to_string(self.folder.path().join("log")).unwrap_or_default()
    }

    /// Folder of the sockets.
    pub fn run_folder(&self) -> PathBuf {
        self.folder.path().join("run")
    }

    /// Folder of the state.
    pub fn state_folder(&self) -> PathBuf {
        self.folder.path().join("state")
    }

    /// Process id of `blixard dev`.
    pub fn pid(&self) -> u32 {
        self.dev.id()
    }

    /// A `blixard` command, not yet started.
    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(self.programs.join("blixard"));
        let address = format!("unix://{}/node.sock", self.run_folder().display());
        command.env("BLIXARD_HOST", address).args(args).stdin(Stdio::null());
        command
    }

    /// Runs `blixard ARGS`.
    pub fn blixard(&self, args: &[&str]) -> Answer {
        self.command(args).output().unwrap().into()
    }

    /// Runs `blixard ARGS` with this on its standard input.
    pub fn blixard_with_input(&self, args: &[&str], input: &[u8]) -> Answer {
        let mut child = self
            .command(args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut stdin = child.stdin.take().unwrap();
        let input = input.to_vec();
        // The writer ends with an error when the command ends early: what it answered tells.
        let writer = std::thread::spawn(move || stdin.write_all(&input));
        let output = child.wait_with_output().unwrap();
        let _ = writer.join().unwrap();
        output.into()
    }

    /// Starts a VM, waits until its guest is ready, and answers its name.
    pub fn run(&self, name: &str, options: &[&str], image: &str, command: &[&str]) -> String {
        let mut args = vec!["run", "-d", "--wait", "ready", "--timeout", "300s", "--name", name];
        args.extend(options);
        args.push(image);
        args.extend(command);
        let answer = self.blixard(&args);
        assert_eq!(answer.code, 0, "{answer:?}\n{}\n{}", self.blixard(&["logs", name]).out, self.log());
        name.into()
    }

    /// Runs a command in a VM; it must succeed.
    pub fn exec(&self, vm: &str, command: &[&str]) -> String {
        self.blixard(&[&["exec", vm], command].concat()).good()
    }

    /// The VM as the API shows it.
    pub fn inspect(&self, vm: &str) -> serde_json::Value {
        let list = self.blixard(&["inspect", vm]).json();
        list.get(0).cloned().unwrap_or_else(|| panic!("{list}"))
    }

    /// Stops the node and its VMs in good order.
    pub fn stop(mut self) {
        self.end();
    }

    fn end(&mut self) {
        if self.dev.try_wait().unwrap().is_some() {
            return;
        }
        let pid = self.dev.id().to_string();
        Command::new("kill").args(["-TERM", &pid]).status().unwrap();
        let deadline = Instant::now() + Duration::from_secs(60);
        while self.dev.try_wait().unwrap().is_none() {
            if Instant::now() > deadline {
                self.dev.kill().unwrap();
                self.dev.wait().unwrap();
                return;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        self.end();
        if std::thread::panicking() {
            println_log(&self.log());
        }
    }
}

#[expect(clippy::print_stderr, reason = "the log of a failed test")]
fn println_log(log: &str) {
    let tail: Vec<&str> = log.lines().rev().take(120).collect();
    for line in tail.into_iter().rev() {
        eprintln!("  | {line}");
    }
}

/// Everything of ours that a host holds: interfaces, packet filter tables, processes, cgroups, files below `folder`, in words.
pub fn traces(folder: &Path) -> Vec<String> {
    let mut found = Vec::new();
    let list = |program: &str, args: &[&str]| -> String {
        Command::new(program)
            .args(args)
            .output()
            .map(|o| String::from_utf8_lossy(&o.stdout).into_owned())
            .unwrap_or_default()
    };
    for line in list("ip", &["-o", "link"]).lines() {
        if line.split_whitespace().nth(1).is_some_and(|name| name.starts_with("bxv")) {
            found.push(format!("interface: {line}"));
        }
    }
    // The tables stay for the network, with rules for all nics (`bxv*`); what names one nic must be gone.
    let names_a_nic = |line: &&str| line.contains("bxv") && !line.contains("bxv*");
    for line in list("nft", &["list", "ruleset"]).lines().filter(names_a_nic) {
        found.push(format!("rule: {}", line.trim()));
    }
    for entry in fs::read_dir("/proc").unwrap().flatten() {
        let comm = fs::read_to_string(entry.path().join("comm")).unwrap_or_default();
        if comm.starts_with("blixard-vmm") {
            found.push(format!("process: {} {}", entry.file_name().display(), comm.trim()));
        }
        let status = fs::read_to_string(entry.path().join("status")).unwrap_or_default();
        let uid =
            status.lines().find_map(|l| l.strip_prefix("Uid:")).and_then(|l| l.split_whitespace().next());
        if uid.and_then(|u| u.parse::<u32>().ok()).is_some_and(|u| u >= 700_000) {
            found.push(format!("uid: {} of {}", uid.unwrap(), comm.trim()));
        }
    }
    let id =
        |name: &str| name.len() == 26 && name.bytes().all(|b| b.is_ascii_uppercase() || b.is_ascii_digit());
    for root in [Path::new("/sys/fs/cgroup"), folder] {
        walk(root, &mut |path| {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            let stem = name.split('.').next().unwrap_or_default().trim_start_matches("vm-");
            if id(stem) {
                found.push(format!("file: {}", path.display()));
            }
        });
    }
    found
}

fn walk(folder: &Path, seen: &mut dyn FnMut(&Path)) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        seen(&entry.path());
        if entry.file_type().is_ok_and(|t| t.is_dir()) {
            walk(&entry.path(), seen);
        }
    }
}

/// A page server on this host, for guests to fetch from; it serves until it is dropped.
pub struct PageServer {
    /// Its port, on all addresses.
    pub port: u16,
    stop: std::sync::Arc<std::sync::atomic::AtomicBool>,
}

impl PageServer {
    /// Serves `page` to whoever asks.
    pub fn start(page: &'static str) -> Self {
        let listener = std::net::TcpListener::bind("[::]:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let stop = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
        let stopped = stop.clone();
        std::thread::spawn(move || {
            for connection in listener.incoming().flatten() {
                if stopped.load(std::sync::atomic::Ordering::Relaxed) {
                    return;
                }
                let mut connection = connection;
                let mut request = [0; 1024];
                let _ = connection.read(&mut request);
                let head = format!("HTTP/1.0 200 OK\r\nContent-Length: {}\r\n\r\n{page}", page.len());
                let _ = connection.write_all(head.as_bytes());
            }
        });
        Self { port, stop }
    }
}

impl Drop for PageServer {
    fn drop(&mut self) {
        self.stop.store(true, std::sync::atomic::Ordering::Relaxed);
        let _ = std::net::TcpStream::connect(("127.0.0.1", self.port));
    }
}

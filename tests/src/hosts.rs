//! The hosts of the rig (`tests/rig`), each with Blixard as an operator installs it: systemd units, `install.sh`, the CLI.
//!
//! Everything is driven from host 0. The API of each other host is a socket here, which ssh forwards, so that one command line
//! reaches all of them. A host that is cut off keeps ssh (port 22) and loses all other traffic with other hosts.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::panic, clippy::print_stdout)]

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::host::Answer;

/// Longest wait for what shall happen: guests are emulated within emulated hosts.
const PATIENCE: Duration = Duration::from_secs(120);
/// Between two looks at what no request can wait for.
const LOOK: Duration = Duration::from_millis(100);
/// Longest wait for an answer of the API.
const ANSWER_MAX: Duration = Duration::from_secs(20);
/// What an operator of slow hosts sets: each processor here is a share of an emulated one, and a node takes ten seconds and more to start again.
const SLOW: &str = "[Service]
ExecStart=
ExecStart=/usr/lib/blixard/blixard-node --socket /run/blixard-node/node.sock --election-timeout 1000 --lease 20000";
/// Folder of the forwarded sockets.
const SOCKETS: &str = "/run/three-hosts";

/// The hosts, numbered from 0, which is where this runs.
pub struct Hosts {
    count: usize,
    begin: Instant,
}

/// A running guest, by what changes when it is started anew: its VMM's process and the id that its kernel gave itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Life {
    vmm: String,
    boot: String,
}

/// Name of a host, which is also its node's.
pub fn name(host: usize) -> String {
    format!("rig{host}")
}

/// Address of a host's node.
pub fn address(host: usize) -> String {
    format!("10.77.0.{}:7440", host + 1)
}

/// A request over the API's socket: status and body.
///
/// # Errors
/// Nobody answers in time.
pub fn request(socket: &str, method: &str, path: &str, body: &str) -> std::io::Result<(u16, Value)> {
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(ANSWER_MAX))?;
    let length = body.len();
    let text = format!(
        "{method} {path} HTTP/1.1\r\nHost: n\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n{body}"
    );
    stream.write_all(text.as_bytes())?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let cut = || std::io::Error::from(std::io::ErrorKind::UnexpectedEof);
    let (head, body) = answer.split_once("\r\n\r\n").ok_or_else(cut)?;
    let status = head.split(' ').nth(1).and_then(|word| word.parse().ok()).ok_or_else(cut)?;
    Ok((status, serde_json::from_str(body).unwrap_or(Value::Null)))
}

impl Hosts {
    /// Those of the rig, with the programs of `programs` and the units of `units` at hand on the disk of each, and the build that
    /// `programs/next` has in place of a program beside them. Nothing is installed yet.
    pub fn prepare(programs: &str, units: &str) -> Self {
        let count = std::env::var("RIG_HOSTS").unwrap_or_default().split_whitespace().count();
        assert_eq!(count, 3, "three hosts are needed: blixard-rig run --hosts 3");
        let hosts = Self { count, begin: Instant::now() };
        let copy = format!(
            "mkdir -p /root/now /root/next /root/units && cp {units}/* /root/units && cd {programs} &&
            cp blixard blixard-agent blixard-netd blixard-node blixard-vmm blixard-init /root/now &&
            ln /root/now/* /root/next && cp --remove-destination next/* /root/next &&
            mkdir -p /etc/systemd/system/blixard-node.service.d &&
            printf '{SLOW}' >/etc/systemd/system/blixard-node.service.d/slow.conf"
        );
        hosts.on_all(|host| drop(hosts.sh(host, &copy).good()));
        std::fs::create_dir_all(SOCKETS).unwrap();
        for host in 1..count {
            let forward = format!("{}:/run/blixard-node/node.sock", hosts.socket(host));
            let status =
                Command::new("ssh").args(["-O", "forward", "-L", &forward, &name(host)]).status().unwrap();
            assert!(status.success(), "the socket of {} is not forwarded", name(host));
        }
        hosts
    }

    /// Says something about the run, with the time since its beginning.
    pub fn say(&self, text: &str) {
        println!("    {:6.1} s  {text}", self.begin.elapsed().as_secs_f64());
    }

    /// Does this on all hosts at the same time.
    pub fn on_all(&self, work: impl Fn(usize) + Sync) {
        let work = &work;
        std::thread::scope(|scope| {
            for host in 0..self.count {
                scope.spawn(move || work(host));
            }
        });
    }

    /// A shell script on a host, not yet started.
    pub fn script(&self, host: usize, script: &str) -> Command {
        let mut command = Command::new(if host == 0 { "sh" } else { "ssh" });
        match host {
            0 => command.args(["-c", script]),
            _ => command.args([&name(host), script]),
        };
        command.stdin(Stdio::null());
        command
    }

    /// Runs a shell script on a host.
    pub fn sh(&self, host: usize, script: &str) -> Answer {
        self.script(host, script).output().unwrap().into()
    }

    /// The socket by which the API of a host is reached from here.
    pub fn socket(&self, host: usize) -> String {
        if host == 0 { "/run/blixard/node.sock".into() } else { format!("{SOCKETS}/{}.sock", name(host)) }
    }

    /// A `blixard` command that asks the node of this host, not yet started.
    pub fn command(&self, host: usize, args: &[&str]) -> Command {
        let mut command = Command::new("/root/now/blixard");
        command.env("BLIXARD_HOST", format!("unix://{}", self.socket(host)));
        command.args(args).stdin(Stdio::null());
        command
    }

    /// Runs `blixard ARGS`, asking the node of this host.
    pub fn blixard(&self, host: usize, args: &[&str]) -> Answer {
        self.command(host, args).output().unwrap().into()
    }

    /// What the API of a host answers to `GET path`; null when it does not answer or refuses.
    pub fn get(&self, host: usize, path: &str) -> Value {
        match request(&self.socket(host), "GET", path, "") {
            Ok((200, value)) => value,
            _ => Value::Null,
        }
    }

    /// A VM, as this host sees it.
    pub fn vm(&self, host: usize, vm: &str) -> Value {
        self.get(host, &format!("/v1/projects/default/vms/{vm}"))
    }

    /// A node, as this host sees it.
    pub fn node(&self, host: usize, of: usize) -> Value {
        self.get(host, &format!("/v1/nodes/{}", name(of)))
    }

    /// The host that a VM is placed on, as the API of `asked` says.
    pub fn place(&self, asked: usize, vm: &str) -> Option<usize> {
        let node = self.vm(asked, vm)["node"].clone();
        (0..self.count).find(|host| node == name(*host).as_str())
    }

    /// The host that leads, as the API of `asked` says.
    pub fn leader(&self, asked: usize) -> Option<usize> {
        let leader = self.get(asked, "/v1/cluster")["leader"].clone();
        (0..self.count).find(|host| leader == name(*host).as_str())
    }

    /// Waits until it is so.
    pub fn until(&self, what: &str, so: impl Fn() -> bool) {
        let begin = Instant::now();
        while !so() {
            assert!(begin.elapsed() < PATIENCE, "after {} s not: {what}", PATIENCE.as_secs());
            std::thread::sleep(LOOK);
        }
    }

    /// Cgroup of a VM on whatever host it is.
    pub fn cgroup(&self, vm: &str) -> PathBuf {
        let id = self.vm(0, vm)["id"].as_str().unwrap().to_owned();
        PathBuf::from(format!("/sys/fs/cgroup/blixard/vm-{id}"))
    }

    /// The guest that runs on this host under this name.
    pub fn life(&self, host: usize, vm: &str) -> Life {
        let file = self.cgroup(vm).join("cgroup.procs");
        let vmm = self.sh(host, &format!("cat {}", file.display())).good();
        let boot = self.blixard(host, &["exec", vm, "cat", "/proc/sys/kernel/random/boot_id"]).good();
        Life { vmm: vmm.trim().into(), boot: boot.trim().into() }
    }

    /// Nothing but ssh comes from this host to another or the other way, until it is mended.
    pub fn cut(&self, host: usize) {
        let rules = "table inet cut {
            chain in { type filter hook input priority -300; iifname eth1 tcp dport != 22 drop; iifname eth1 meta l4proto != tcp drop; }
            chain out { type filter hook output priority -300; oifname eth1 tcp sport != 22 drop; oifname eth1 meta l4proto != tcp drop; }
        }";
        self.sh(host, &format!("nft -f - <<'X'\n{rules}\nX")).good();
    }

    /// Ends [`Hosts::cut`].
    pub fn mend(&self, host: usize) {
        self.sh(host, "nft delete table inet cut").good();
    }

    /// Installs the programs of this folder on a host as its operator does, also in place of others that run.
    pub fn install(&self, host: usize, programs: &str) -> Answer {
        self.sh(host, &format!("sh /root/units/install.sh {programs}"))
    }

    /// The end of the log of Blixard's units on a host.
    pub fn log(&self, host: usize, lines: usize) -> String {
        self.sh(host, &format!("journalctl -q --no-pager -o short-precise -n {lines} -u 'blixard*'")).out
    }
}

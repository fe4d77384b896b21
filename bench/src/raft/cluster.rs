//! Three nodes of ours with default settings: TLS between them, the API over loopback TCP.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::failover::Member;
use super::{RaftError, System, load};

/// Longest wait for the cluster to form.
const FORM_MAX: Duration = Duration::from_secs(60);
/// Path of VMs.
pub const VMS: &str = "/v1/projects/default/vms";

/// An HTTP/1.1 connection that is used again and again.
pub struct Http(BufReader<TcpStream>);

impl Http {
    pub fn connect(address: SocketAddr, time: Duration) -> Result<Self, RaftError> {
        let failed = || RaftError::system(format!("connect to {address}"));
        let stream = TcpStream::connect_timeout(&address, time).map_err(failed())?;
        stream.set_nodelay(true).map_err(failed())?;
        stream.set_read_timeout(Some(time)).map_err(failed())?;
        Ok(Self(BufReader::new(stream)))
    }

    pub fn ask(&mut self, method: &str, path: &str, body: &[u8]) -> Result<(u16, Vec<u8>), RaftError> {
        self.exchange(method, path, body).map_err(RaftError::system(format!("{method} {path}")))
    }

    fn exchange(&mut self, method: &str, path: &str, body: &[u8]) -> std::io::Result<(u16, Vec<u8>)> {
        let length = body.len();
        let mut text =
            format!("{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {length}\r\n\r\n")
                .into_bytes();
        text.extend_from_slice(body);
        self.0.get_mut().write_all(&text)?;
        let (mut status, mut length) = (0, 0);
        loop {
            let mut line = String::new();
            if self.0.read_line(&mut line)? == 0 {
                return Err(std::io::ErrorKind::UnexpectedEof.into());
            }
            let line = line.trim_end().to_ascii_lowercase();
            if line.is_empty() {
                break;
            }
            if let Some(rest) = line.strip_prefix("http/1.1 ") {
                status = rest.split(' ').next().and_then(|s| s.parse().ok()).unwrap_or(0);
            } else if let Some(rest) = line.strip_prefix("content-length: ") {
                length = rest.parse().map_err(std::io::Error::other)?;
            }
        }
        let mut content = vec![0; length];
        self.0.read_exact(&mut content)?;
        Ok((status, content))
    }
}

struct Node {
    name: String,
    folder: PathBuf,
    api: SocketAddr,
    arguments: Vec<String>,
    program: PathBuf,
    process: Child,
}

/// Three nodes.
pub struct Blixard {
    nodes: Vec<Node>,
    /// Where the leader answers.
    leader: SocketAddr,
}

/// An address that nobody listens at.
pub fn free() -> Result<SocketAddr, RaftError> {
    let failed = || RaftError::system("find a free port");
    TcpListener::bind("127.0.0.1:0").and_then(|l| l.local_addr()).map_err(failed())
}

impl Node {
    fn new(work: &Path, program: &Path, name: &str, join: Option<String>) -> Result<Self, RaftError> {
        let folder = work.join(name);
        std::fs::remove_dir_all(&folder).ok();
        std::fs::create_dir_all(&folder).map_err(RaftError::system("make a folder"))?;
        let (api, address) = (free()?, free()?);
        let text = |path: PathBuf| path.display().to_string();
        let mut arguments = vec![
            "--state".into(),
            text(folder.join("state")),
            "--agent".into(),
            text(folder.join("agent.sock")),
            "--socket".into(),
            text(folder.join("api.sock")),
            "--init".into(),
            text(program.to_owned()),
            "--name".into(),
            name.into(),
            "--listen".into(),
            api.to_string(),
            "--address".into(),
            address.to_string(),
        ];
        if let Some(token) = join {
            arguments.extend(["--join".into(), token]);
        }
        let process = spawn(program, &arguments, &folder)?;
        Ok(Self { name: name.into(), folder, api, arguments, program: program.to_owned(), process })
    }

    fn get(&self, path: &str) -> Option<Value> {
        let (status, body) =
            Http::connect(self.api, Duration::from_secs(2)).ok()?.ask("GET", path, &[]).ok()?;
        (status == 200).then(|| serde_json::from_slice(&body).ok())?
    }

    /// Lets an agent tell once what the node has: VMs are placed on it from then on.
    fn tell(&self) -> Result<(), RaftError> {
        let mut agent = start_agent(&self.program, &self.folder.join("agent.sock"))?;
        let path = format!("/v1/nodes/{}", self.name);
        let told = until("what a node has is known", || self.get(&path)?.get("room").map(drop));
        agent.kill().ok();
        agent.wait().ok();
        told
    }

    fn post(&self, path: &str, body: &[u8]) -> Result<(u16, Vec<u8>), RaftError> {
        Http::connect(self.api, Duration::from_secs(10))?.ask("POST", path, body)
    }
}

fn spawn(program: &Path, arguments: &[String], folder: &Path) -> Result<Child, RaftError> {
    let log = std::fs::OpenOptions::new().create(true).append(true).open(folder.join("log"));
    let log = log.map_err(RaftError::system("open a log"))?;
    Command::new(program)
        .args(arguments)
        .env(PURGE_DELAY.0, PURGE_DELAY.1)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log)
        .spawn()
        .map_err(RaftError::system(format!("start {}", program.display())))
}

/// Starts the agent without a host that is built beside this node, at a socket.
pub fn start_agent(node: &Path, socket: &Path) -> Result<Child, RaftError> {
    let program = node.with_file_name("examples").join("agent");
    let failed = RaftError::system("start the agent (cargo build --release -p blixard-node --examples)");
    Command::new(program).arg(socket).stdin(Stdio::piped()).spawn().map_err(failed)
}

/// In the environment of a node, as its unit has it.
pub const PURGE_DELAY: (&str, &str) = ("MIMALLOC_PURGE_DELAY", "100");

/// Waits until something is so.
pub fn until<T>(what: &str, look: impl Fn() -> Option<T>) -> Result<T, RaftError> {
    let begin = Instant::now();
    loop {
        if let Some(found) = look() {
            return Ok(found);
        }
        if begin.elapsed() > FORM_MAX {
            return Err(RaftError::Late(what.to_owned()));
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// The tar of an image with one file, and of the least that is taken for a kernel.
pub fn content() -> (Vec<u8>, Vec<u8>) {
    let mut kernel = vec![0; 8192];
    let mut put = |at: usize, bytes: &[u8]| {
        kernel.iter_mut().skip(at).zip(bytes).for_each(|(to, from)| *to = *from);
    };
    put(0x1f1, &[1]);
    put(0x1fe, &[0x55, 0xaa]);
    put(0x200, &[0xeb, 0x66]);
    put(0x202, b"HdrS");
    put(0x206, &0x020f_u16.to_le_bytes());
    put(0x20e, &0x1000_u16.to_le_bytes());
    put(0x211, &[1]);
    put(0x236, &[1, 0]);
    put(0x1200, b"6.1.0-bench (builder)\0");
    (tar(&[("bin/app", b"#!/bin/sh\n")]), tar(&[("kernel", &kernel), ("release", b"6.1.0-bench\n")]))
}

fn tar(files: &[(&str, &[u8])]) -> Vec<u8> {
    let mut out = Vec::new();
    for (name, contents) in files {
        let mut header = vec![0; 512];
        let mut put = |at: usize, bytes: &[u8]| {
            header.iter_mut().skip(at).zip(bytes).for_each(|(to, from)| *to = *from);
        };
        put(0, name.as_bytes());
        put(100, b"0000755\0");
        put(108, b"0000000\0");
        put(116, b"0000000\0");
        put(124, format!("{:011o}\0", contents.len()).as_bytes());
        put(136, b"00000000000\0");
        put(148, b"        ");
        put(156, b"0");
        put(257, b"ustar\x0000");
        let sum: u32 = header.iter().map(|b| u32::from(*b)).sum();
        header.iter_mut().skip(148).zip(format!("{sum:06o}\0 ").bytes()).for_each(|(to, from)| *to = from);
        out.extend_from_slice(&header);
        out.extend_from_slice(contents);
        out.resize(out.len().next_multiple_of(512), 0);
    }
    out.resize(out.len() + 1024, 0);
    out
}

impl System for Blixard {
    const NAME: &'static str = "blixard";

    fn start(work: &Path, programs: &Path) -> Result<Self, RaftError> {
        let program = programs.join("blixard-node");
        let first = Node::new(work, &program, "n1", None)?;
        until("the first node says where it is", || {
            first.get("/v1/nodes/n1")?.get("address")?.as_str().map(drop)
        })?;
        let mut nodes = vec![first];
        for name in ["n2", "n3"] {
            let first = nodes.first().ok_or_else(|| RaftError::Wrong("no first node".into()))?;
            let (_, body) = first.post("/v1/join-tokens", b"{}")?;
            let token: Value = serde_json::from_slice(&body).unwrap_or_default();
            let token = token.get("token").and_then(Value::as_str).map(str::to_owned);
            nodes.push(Node::new(work, &program, name, token)?);
        }
        for node in &nodes {
            until("three nodes vote", || {
                let status = node.get("/v1/cluster")?;
                (status.get("voters")?.as_array()?.len() == 3).then_some(())
            })?;
            node.tell()?;
        }
        let mut cluster = Self {
            leader: nodes.first().map(|node| node.api).unwrap_or_else(|| ([127, 0, 0, 1], 0).into()),
            nodes,
        };
        cluster.find_leader()?;
        let (image, kernel) = content();
        let mut http = Http::connect(cluster.leader, Duration::from_secs(30))?;
        for (path, body) in [("/v1/images?name=img", image), ("/v1/kernels?name=default", kernel)] {
            let (status, answer) = http.ask("POST", path, &body)?;
            if status != 201 {
                return Err(RaftError::Wrong(format!(
                    "{path}: {status} {}",
                    String::from_utf8_lossy(&answer)
                )));
            }
        }
        Ok(cluster)
    }

    fn client(&self, number: usize) -> Result<impl load::Client, RaftError> {
        let mut http = Http::connect(self.leader, Duration::from_secs(30))?;
        let name = format!("load-{number}");
        let (status, body) = http.ask("POST", VMS, &vm(&name, number as u128 + 1))?;
        if status != 201 && status != 200 {
            return Err(RaftError::Wrong(format!("{status}: {}", String::from_utf8_lossy(&body))));
        }
        let base = std::process::id().wrapping_add(u32::try_from(number).unwrap_or(0));
        Ok(Client { http, name, base: u64::from(base % 1000) })
    }
}

/// Crockford base 32 of a ULID with this random part.
pub fn ulid(number: u128) -> String {
    const DIGITS: &[u8; 32] = b"0123456789ABCDEFGHJKMNPQRSTVWXYZ";
    let value = (1_795_000_000_000_u128 << 80) | number;
    let digit = |n: usize| usize::try_from((value >> (n * 5)) & 31).ok().and_then(|d| DIGITS.get(d)).copied();
    (0..26).rev().filter_map(digit).map(char::from).collect()
}

fn vm(name: &str, number: u128) -> Vec<u8> {
    json!({"id": ulid(number), "name": name, "spec": {"image": "img"}}).to_string().into_bytes()
}

struct Client {
    http: Http,
    name: String,
    base: u64,
}

impl load::Client for Client {
    fn write(&mut self, number: u64) -> Result<(), RaftError> {
        // Another grace time than before, so that each request changes the VM.
        let body = format!("{{\"grace_ms\":{}}}", self.base + number);
        let path = format!("{VMS}/{}:stop", self.name);
        match self.http.ask("POST", &path, body.as_bytes())? {
            (200, _) => Ok(()),
            (status, body) => Err(RaftError::Wrong(format!("{status}: {}", String::from_utf8_lossy(&body)))),
        }
    }

    fn read(&mut self) -> Result<(), RaftError> {
        let path = format!("{VMS}/{}?linearizable=true", self.name);
        match self.http.ask("GET", &path, &[])? {
            (200, _) => Ok(()),
            (status, body) => Err(RaftError::Wrong(format!("{status}: {}", String::from_utf8_lossy(&body)))),
        }
    }
}

impl Blixard {
    fn find_leader(&mut self) -> Result<usize, RaftError> {
        let nodes = &self.nodes;
        let at = until("somebody leads", || {
            let status = nodes.iter().find_map(|node| node.get("/v1/cluster?linearizable=true"))?;
            let leader = status.get("leader")?.as_str()?.to_owned();
            nodes.iter().position(|node| node.name == leader)
        })?;
        self.leader = nodes.get(at).map_or(self.leader, |node| node.api);
        Ok(at)
    }
}

impl Member for Blixard {
    fn leader(&mut self) -> Result<usize, RaftError> {
        self.find_leader()
    }

    fn pid(&self, at: usize) -> Option<u32> {
        self.nodes.get(at).map(|node| node.process.id())
    }

    fn kill(&mut self, at: usize) {
        if let Some(node) = self.nodes.get_mut(at) {
            node.process.kill().ok();
            node.process.wait().ok();
        }
    }

    fn restart(&mut self, at: usize) -> Result<(), RaftError> {
        let Some(node) = self.nodes.get_mut(at) else { return Ok(()) };
        node.process = spawn(&node.program, &node.arguments, &node.folder)?;
        self.caught_up(at)
    }

    fn caught_up(&self, at: usize) -> Result<(), RaftError> {
        let applied = |node: &Node| node.get("/v1/cluster?linearizable=true")?.get("applied")?.as_u64();
        let wanted = until("a node answers", || self.nodes.iter().find_map(applied))?;
        until("a node has caught up", || {
            applied(self.nodes.get(at)?).filter(|applied| *applied >= wanted).map(drop)
        })
    }

    fn create(&self, at: usize, number: u64, time: Duration) -> Result<(), RaftError> {
        let api = self.nodes.get(at % self.nodes.len()).map(|node| node.api);
        let api = api.ok_or_else(|| RaftError::Wrong("no such node".into()))?;
        let name = format!("f-{number}");
        let number = u128::from(number) + (1 << 64);
        match Http::connect(api, time)?.ask("POST", VMS, &vm(&name, number))? {
            (200 | 201, _) => Ok(()),
            (status, _) => Err(RaftError::Wrong(format!("status {status}"))),
        }
    }

    fn has(&self, number: u64) -> Result<bool, RaftError> {
        let path = format!("{VMS}/f-{number}?linearizable=true");
        let (status, _) = Http::connect(self.leader, Duration::from_secs(10))?.ask("GET", &path, &[])?;
        Ok(status == 200)
    }
}

impl Drop for Blixard {
    fn drop(&mut self) {
        for at in 0..self.nodes.len() {
            self.kill(at);
        }
    }
}

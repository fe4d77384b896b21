//! A node process, an agent beside it, and just enough HTTP to ask the node anything, also what no client would send.
#![allow(dead_code, reason = "each test program uses its own part")]

pub mod three;

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use blixard_tests::sim_agent::{Manner, SimAgent};
use serde_json::{Value, json};
use tempfile::TempDir;

pub const VMS: &str = "/v1/projects/default/vms";

/// A node and its folder. Dropping it kills the process.
pub struct Node {
    pub folder: TempDir,
    process: Option<Child>,
    name: String,
    /// What the program is run by, and with.
    wrapper: Vec<String>,
    arguments: Vec<String>,
    /// What it logs.
    log: Arc<Mutex<Vec<String>>>,
}

impl Node {
    /// A node without agent.
    pub fn alone() -> Self {
        Self::with_arguments(&[])
    }

    /// A node without agent that is given these arguments too.
    pub fn with_arguments(arguments: &[&str]) -> Self {
        Self::named("one", &[], arguments)
    }

    /// A node with this name, run by `wrapper`.
    pub fn named(name: &str, wrapper: &[&str], arguments: &[&str]) -> Self {
        let owned = |list: &[&str]| list.iter().map(|a| (*a).to_owned()).collect();
        let mut node = Self {
            folder: TempDir::new().unwrap(),
            process: None,
            name: name.to_owned(),
            wrapper: owned(wrapper),
            arguments: owned(arguments),
            log: Arc::default(),
        };
        node.start();
        node
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    /// The lines that it has logged and that contain this.
    pub fn logged(&self, text: &str) -> Vec<String> {
        self.log.lock().unwrap().iter().filter(|line| line.contains(text)).cloned().collect()
    }

    /// A node with an agent, an image `img` and a kernel.
    pub fn with_agent(manner: Manner) -> (Self, SimAgent) {
        let node = Self::alone();
        let agent = SimAgent::start(&node.agent_socket(), manner).unwrap();
        node.add_content();
        node.until("the agent is known", || node.get("/v1/health").json()["agent"] == true);
        (node, agent)
    }

    pub fn agent_socket(&self) -> PathBuf {
        self.folder.path().join("agent.sock")
    }

    pub fn socket(&self) -> PathBuf {
        self.folder.path().join("api.sock")
    }

    pub fn pid(&self) -> u32 {
        self.process.as_ref().unwrap().id()
    }

    pub fn start(&mut self) {
        let init = self.folder.path().join("init");
        std::fs::write(&init, b"an init program").unwrap();
        let mut words = self.wrapper.iter().map(String::as_str).chain([env!("CARGO_BIN_EXE_blixard-node")]);
        let mut process = Command::new(words.next().unwrap())
            .args(words)
            .arg("--state")
            .arg(self.folder.path().join("state"))
            .arg("--agent")
            .arg(self.agent_socket())
            .arg("--socket")
            .arg(self.socket())
            .arg("--init")
            .arg(init)
            .args(["--name", &self.name, "--snapshot-after", "50"])
            .args(&self.arguments)
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(process.stderr.take().unwrap()).lines();
        let mut log = Vec::new();
        let ready = lines.by_ref().map_while(Result::ok).any(|line| {
            let ready = line.contains("ready");
            log.push(line);
            ready
        });
        assert!(ready, "the node ended: {log:#?}");
        // The rest is passed on, so that a failed test shows it.
        let (name, kept) = (self.name.clone(), Arc::clone(&self.log));
        kept.lock().unwrap().extend(log);
        std::thread::spawn(move || {
            lines.map_while(Result::ok).for_each(|line| {
                eprintln!("{name}: {line}");
                kept.lock().unwrap().push(line);
            });
        });
        self.process = Some(process);
    }

    /// SIGKILL.
    pub fn kill(&mut self) {
        let mut process = self.process.take().unwrap();
        process.kill().unwrap();
        process.wait().unwrap();
    }

    /// Sends the process a signal.
    pub fn signal(&self, signal: nix::sys::signal::Signal) {
        let pid = nix::unistd::Pid::from_raw(i32::try_from(self.pid()).unwrap());
        nix::sys::signal::kill(pid, signal).unwrap();
    }

    /// SIGTERM; answers whether the process ended with success.
    pub fn terminate(&mut self) -> bool {
        let mut process = self.process.take().unwrap();
        let pid = nix::unistd::Pid::from_raw(i32::try_from(process.id()).unwrap());
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
        process.wait().unwrap().success()
    }

    pub fn get(&self, path: &str) -> Answer {
        self.ask("GET", path, &[], b"")
    }

    pub fn post(&self, path: &str, body: &Value) -> Answer {
        self.ask("POST", path, &[], body.to_string().as_bytes())
    }

    pub fn delete(&self, path: &str) -> Answer {
        self.ask("DELETE", path, &[], b"")
    }

    pub fn ask(&self, method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) -> Answer {
        let mut stream = self.open(method, path, headers, body.len());
        match stream.write_all(body) {
            // It was refused before all of it was read; the answer says why.
            Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => {}
            other => other.unwrap(),
        }
        Answer::read(stream)
    }

    /// Sends the head of a request.
    pub fn open(&self, method: &str, path: &str, headers: &[(&str, &str)], length: usize) -> UnixStream {
        let mut head = format!("{method} {path} HTTP/1.1\r\nHost: node\r\n");
        if !headers.iter().any(|(name, _)| name.eq_ignore_ascii_case("connection")) {
            head.push_str("Connection: close\r\n");
        }
        if length > 0 {
            head.push_str(&format!("Content-Length: {length}\r\n"));
        }
        for (name, value) in headers {
            head.push_str(&format!("{name}: {value}\r\n"));
        }
        head.push_str("\r\n");
        let mut stream = UnixStream::connect(self.socket()).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
        stream.write_all(head.as_bytes()).unwrap();
        stream
    }

    /// An image `img` that runs `/bin/app`, and a kernel `default`.
    pub fn add_content(&self) {
        assert_eq!(self.ask("POST", "/v1/images?name=img", &[], &image()).status, 201);
        let kernel = self.ask("POST", "/v1/kernels?name=default", &[], &kernel());
        assert_eq!(kernel.status, 201, "{}", kernel.text());
    }

    /// Lets an agent tell once what the node has: VMs are placed on it from then on.
    pub fn tell(&self) {
        // Another instance than those that tests start afterwards.
        let agent =
            SimAgent::start_with(&self.agent_socket(), Manner::Prompt, 1000, Default::default()).unwrap();
        let path = format!("/v1/nodes/{}", self.name);
        self.until("its room is known", || self.get(&path).json()["room"].is_object());
        drop(agent);
    }

    /// Creates a VM of the image `img` and answers it.
    pub fn create(&self, number: u128, name: &str) -> Value {
        let answer = self.post(VMS, &create(number, name));
        assert_eq!(answer.status, 201, "{}", answer.text());
        answer.json()
    }

    /// Waits until something is so that no request can wait for.
    pub fn until(&self, what: &str, so: impl Fn() -> bool) {
        let begin = Instant::now();
        while !so() {
            assert!(begin.elapsed() < Duration::from_secs(20), "not in time: {what}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        if let Some(mut process) = self.process.take() {
            process.kill().ok();
            process.wait().ok();
        }
    }
}

/// An id.
pub fn id(number: u128) -> String {
    blixard_api::VmId::from_parts(1_795_000_000_000, number).to_string()
}

/// The body of a create request.
pub fn create(number: u128, name: &str) -> Value {
    json!({"id": id(number), "name": name, "spec": {"image": "img"}})
}

/// A tar with one file.
pub fn image() -> Vec<u8> {
    tar(&[("bin/app", b"#!/bin/sh\n")])
}

/// The least that is taken for a kernel: a header of the Linux boot protocol with a version text, and a release.
pub fn kernel() -> Vec<u8> {
    let mut kernel = vec![0; 8192];
    let mut put = |at: usize, bytes: &[u8]| kernel[at..at + bytes.len()].copy_from_slice(bytes);
    put(0x1f1, &[1]);
    put(0x1fe, &[0x55, 0xaa]);
    put(0x200, &[0xeb, 0x66]);
    put(0x202, b"HdrS");
    put(0x206, &0x020f_u16.to_le_bytes());
    put(0x20e, &0x1000_u16.to_le_bytes());
    put(0x211, &[1]);
    put(0x236, &[1, 0]);
    put(0x1200, b"6.1.0-test (builder)\0");
    tar(&[("kernel", &kernel), ("release", b"6.1.0-test\n")])
}

fn tar(files: &[(&str, &[u8])]) -> Vec<u8> {
    let mut out = Vec::new();
    for (name, contents) in files {
        let mut header = [0u8; 512];
        header[..name.len()].copy_from_slice(name.as_bytes());
        header[100..108].copy_from_slice(b"0000755\0");
        header[108..116].copy_from_slice(b"0000000\0");
        header[116..124].copy_from_slice(b"0000000\0");
        header[124..136].copy_from_slice(format!("{:011o}\0", contents.len()).as_bytes());
        header[136..148].copy_from_slice(b"00000000000\0");
        header[148..156].copy_from_slice(b"        ");
        header[156] = b'0';
        header[257..265].copy_from_slice(b"ustar\x0000");
        let sum: u32 = header.iter().map(|b| u32::from(*b)).sum();
        header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        out.extend_from_slice(&header);
        out.extend_from_slice(contents);
        out.resize(out.len().next_multiple_of(512), 0);
    }
    out.resize(out.len() + 1024, 0);
    out
}

/// An answer, read to its end.
#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub head: String,
    pub body: Vec<u8>,
}

impl Answer {
    pub fn read(stream: UnixStream) -> Self {
        let mut reader = BufReader::new(stream);
        let (status, head) = read_head(&mut reader);
        let mut body = Vec::new();
        if head.to_ascii_lowercase().contains("transfer-encoding: chunked") {
            while let Some(chunk) = read_chunk(&mut reader) {
                body.extend(chunk);
            }
        } else if let Some(length) = header(&head, "content-length") {
            body.resize(length.parse().unwrap(), 0);
            reader.read_exact(&mut body).unwrap();
        }
        Self { status, head, body }
    }

    pub fn header(&self, name: &str) -> Option<String> {
        header(&self.head, name)
    }

    pub fn revision(&self) -> u64 {
        self.header("blixard-revision").unwrap().parse().unwrap()
    }

    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|e| panic!("{e}: {}", self.text()))
    }

    /// Fields and codes of a refusal, in order of field.
    pub fn details(&self) -> Vec<(String, String)> {
        let body = self.json();
        let text = |v: &Value| v.as_str().unwrap().to_owned();
        let mut found: Vec<_> = body["details"]
            .as_array()
            .unwrap()
            .iter()
            .map(|d| (text(&d["field"]), text(&d["code"])))
            .collect();
        found.sort();
        found
    }
}

fn header(head: &str, name: &str) -> Option<String> {
    let wanted = format!("{}:", name.to_ascii_lowercase());
    let line = head.lines().find(|line| line.to_ascii_lowercase().starts_with(&wanted))?;
    Some(line.split_once(':')?.1.trim().to_owned())
}

/// Status and head of an answer whose body follows in `reader`.
pub fn read_head(reader: &mut impl BufRead) -> (u16, String) {
    let mut head = String::new();
    while !head.ends_with("\r\n\r\n") {
        assert_ne!(reader.read_line(&mut head).unwrap(), 0, "the node closed the connection: {head:?}");
    }
    (head.split(' ').nth(1).unwrap().parse().unwrap(), head)
}

/// The next chunk of a chunked body; `None` at its end.
pub fn read_chunk(reader: &mut impl BufRead) -> Option<Vec<u8>> {
    let mut line = String::new();
    reader.read_line(&mut line).unwrap();
    let length = usize::from_str_radix(line.trim(), 16).unwrap_or_else(|_| panic!("no chunk: {line:?}"));
    let mut chunk = vec![0; length + 2];
    reader.read_exact(&mut chunk).unwrap();
    chunk.truncate(length);
    (length > 0).then_some(chunk)
}

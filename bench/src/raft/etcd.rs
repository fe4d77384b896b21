//! Three members of etcd with default settings, asked in its own protocol: gRPC over HTTP/2, just as much of it as is needed.

use std::io::{BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use super::cluster::until;
use super::failover::Member;
use super::{RaftError, System, load};

/// Bytes of each value: about what a change of a VM adds to the log.
const VALUE_BYTES: usize = 256;

/// One HTTP/2 connection with one call at a time (RFC 9113).
struct Grpc {
    stream: BufReader<TcpStream>,
    next: u32,
    /// Bytes received since the window was last opened.
    received: u32,
}

fn varint(mut value: u64, out: &mut Vec<u8>) {
    while value >= 0x80 {
        out.push(u8::try_from(value & 0x7f).unwrap_or(0) | 0x80);
        value >>= 7;
    }
    out.push(u8::try_from(value).unwrap_or(0));
}

fn field(number: u8, bytes: &[u8], out: &mut Vec<u8>) {
    out.push(number << 3 | 2);
    varint(u64::try_from(bytes.len()).unwrap_or(0), out);
    out.extend_from_slice(bytes);
}

/// The number in this field of a message, and the bytes of another one; both 0 when they are missing.
fn parse(mut message: &[u8]) -> Vec<(u64, u64, Vec<u8>)> {
    fn read(bytes: &mut &[u8]) -> Option<u64> {
        let (mut value, mut shift) = (0_u64, 0);
        loop {
            let (first, rest) = bytes.split_first()?;
            *bytes = rest;
            value |= u64::from(first & 0x7f).checked_shl(shift)?;
            if first & 0x80 == 0 {
                return Some(value);
            }
            shift += 7;
        }
    }
    let mut fields = Vec::new();
    while let Some(tag) = read(&mut message) {
        match tag & 7 {
            0 => match read(&mut message) {
                Some(value) => fields.push((tag >> 3, value, vec![])),
                None => break,
            },
            2 => {
                let Some(length) = read(&mut message).and_then(|l| usize::try_from(l).ok()) else { break };
                let Some((bytes, rest)) = message.split_at_checked(length) else { break };
                fields.push((tag >> 3, 0, bytes.to_vec()));
                message = rest;
            }
            _ => break,
        }
    }
    fields
}

fn frame(kind: u8, flags: u8, stream: u32, content: &[u8], out: &mut Vec<u8>) {
    let length = u32::try_from(content.len()).unwrap_or(0).to_be_bytes();
    out.extend_from_slice(length.get(1..).unwrap_or_default());
    out.extend_from_slice(&[kind, flags]);
    out.extend_from_slice(&stream.to_be_bytes());
    out.extend_from_slice(content);
}

impl Grpc {
    fn connect(address: SocketAddr, time: Duration) -> Result<Self, RaftError> {
        let failed = || RaftError::system(format!("connect to {address}"));
        let stream = TcpStream::connect_timeout(&address, time).map_err(failed())?;
        stream.set_nodelay(true).map_err(failed())?;
        stream.set_read_timeout(Some(time)).map_err(failed())?;
        let mut hello = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
        frame(4, 0, 0, &[], &mut hello);
        // Room for a gigabyte of answers.
        frame(8, 0, 0, &(1_u32 << 30).to_be_bytes(), &mut hello);
        let mut stream = BufReader::new(stream);
        stream.get_mut().write_all(&hello).map_err(failed())?;
        Ok(Self { stream, next: 1, received: 0 })
    }

    fn call(&mut self, path: &str, message: &[u8]) -> Result<Vec<u8>, RaftError> {
        let answer = self.exchange(path, message).map_err(RaftError::system(format!("call {path}")))?;
        answer.ok_or_else(|| RaftError::Wrong(format!("{path} was refused")))
    }

    /// The message of the answer; `None` when there is none but a status.
    fn exchange(&mut self, path: &str, message: &[u8]) -> std::io::Result<Option<Vec<u8>>> {
        let id = self.next;
        self.next += 2;
        let mut head = Vec::new();
        for (name, value) in [
            (":method", "POST"),
            (":scheme", "http"),
            (":path", path),
            (":authority", "localhost"),
            ("content-type", "application/grpc"),
            ("te", "trailers"),
        ] {
            // A literal without indexing and without Huffman coding (RFC 7541 section 6.2.2).
            head.push(0);
            for text in [name, value] {
                head.push(u8::try_from(text.len()).map_err(std::io::Error::other)?);
                head.extend_from_slice(text.as_bytes());
            }
        }
        let mut content = vec![0];
        content
            .extend_from_slice(&u32::try_from(message.len()).map_err(std::io::Error::other)?.to_be_bytes());
        content.extend_from_slice(message);
        let mut request = Vec::new();
        frame(1, 0x4, id, &head, &mut request);
        frame(0, 0x1, id, &content, &mut request);
        self.stream.get_mut().write_all(&request)?;
        let mut answer: Option<Vec<u8>> = None;
        loop {
            let mut head = [0; 9];
            self.stream.read_exact(&mut head)?;
            let [a, b, c, kind, flags, d, e, f, g] = head;
            let length = u32::from_be_bytes([0, a, b, c]);
            let stream = u32::from_be_bytes([d & 0x7f, e, f, g]);
            let mut content = vec![0; usize::try_from(length).map_err(std::io::Error::other)?];
            self.stream.read_exact(&mut content)?;
            match kind {
                0 if stream == id => {
                    self.received += length;
                    let message = content.get(5..).unwrap_or_default();
                    answer.get_or_insert_with(Vec::new).extend_from_slice(message);
                }
                3 if stream == id => return Ok(None),
                4 if flags & 1 == 0 => self.reply(4, &[])?,
                6 if flags & 1 == 0 => self.reply(6, &content)?,
                7 => return Err(std::io::ErrorKind::ConnectionAborted.into()),
                _ => {}
            }
            if self.received > 1 << 24 {
                let opened = self.received.to_be_bytes();
                self.received = 0;
                let mut update = Vec::new();
                frame(8, 0, 0, &opened, &mut update);
                self.stream.get_mut().write_all(&update)?;
            }
            if kind <= 1 && stream == id && flags & 1 == 1 {
                return Ok(answer);
            }
        }
    }

    fn reply(&mut self, kind: u8, content: &[u8]) -> std::io::Result<()> {
        let mut out = Vec::new();
        frame(kind, 1, 0, content, &mut out);
        self.stream.get_mut().write_all(&out)
    }

    fn put(&mut self, key: &str, value: &[u8]) -> Result<(), RaftError> {
        let mut message = Vec::new();
        field(1, key.as_bytes(), &mut message);
        field(2, value, &mut message);
        self.call("/etcdserverpb.KV/Put", &message).map(drop)
    }

    /// True when the key is there.
    fn get(&mut self, key: &str) -> Result<bool, RaftError> {
        let mut message = Vec::new();
        field(1, key.as_bytes(), &mut message);
        let answer = self.call("/etcdserverpb.KV/Range", &message)?;
        Ok(parse(&answer).iter().any(|(number, _, _)| *number == 2))
    }

    /// Whether the member that answers leads.
    fn leads(&mut self) -> Result<bool, RaftError> {
        let answer = parse(&self.call("/etcdserverpb.Maintenance/Status", &[])?);
        let head = answer.iter().find(|(number, _, _)| *number == 1).map(|(_, _, bytes)| parse(bytes));
        let member = head.and_then(|head| head.iter().find(|(n, _, _)| *n == 2).map(|(_, value, _)| *value));
        let leader = answer.iter().find(|(number, _, _)| *number == 4).map(|(_, value, _)| *value);
        Ok(leader.is_some() && leader == member)
    }
}

struct Process {
    arguments: Vec<String>,
    folder: PathBuf,
    client: SocketAddr,
    process: Child,
}

/// Three members.
pub struct Etcd {
    members: Vec<Process>,
    leader: SocketAddr,
}

fn spawn(arguments: &[String], folder: &Path) -> Result<Child, RaftError> {
    let log = std::fs::OpenOptions::new().create(true).append(true).open(folder.join("log"));
    let log = log.map_err(RaftError::system("open a log"))?;
    Command::new("etcd")
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log)
        .spawn()
        .map_err(RaftError::system("start etcd (Debian: apt-get install etcd-server)"))
}

impl System for Etcd {
    const NAME: &'static str = "etcd";

    fn start(work: &Path, _: &Path) -> Result<Self, RaftError> {
        let free = || {
            let failed = RaftError::system("find a free port");
            TcpListener::bind("127.0.0.1:0").and_then(|l| l.local_addr()).map_err(failed)
        };
        let mut addresses = Vec::new();
        for n in 1..=3 {
            addresses.push((format!("e{n}"), free()?, free()?));
        }
        let all: Vec<String> =
            addresses.iter().map(|(name, peer, _)| format!("{name}=http://{peer}")).collect();
        let mut members = Vec::new();
        for (name, peer, client) in &addresses {
            let folder = work.join(name);
            std::fs::remove_dir_all(&folder).ok();
            std::fs::create_dir_all(&folder).map_err(RaftError::system("make a folder"))?;
            let arguments: Vec<String> = [
                ("--name", name.clone()),
                ("--data-dir", folder.join("data").display().to_string()),
                ("--listen-peer-urls", format!("http://{peer}")),
                ("--initial-advertise-peer-urls", format!("http://{peer}")),
                ("--listen-client-urls", format!("http://{client}")),
                ("--advertise-client-urls", format!("http://{client}")),
                ("--initial-cluster", all.join(",")),
                ("--initial-cluster-state", "new".into()),
            ]
            .into_iter()
            .flat_map(|(option, value)| [option.to_owned(), value])
            .collect();
            let process = spawn(&arguments, &folder)?;
            members.push(Process { arguments, folder, client: *client, process });
        }
        let leader = ([127, 0, 0, 1], 0).into();
        let mut cluster = Self { members, leader };
        cluster.leader()?;
        Ok(cluster)
    }

    fn client(&self, number: usize) -> Result<impl load::Client, RaftError> {
        let mut grpc = Grpc::connect(self.leader, Duration::from_secs(30))?;
        let key = format!("load-{number}");
        grpc.put(&key, &[b'x'; VALUE_BYTES])?;
        Ok(Client { grpc, key })
    }
}

struct Client {
    grpc: Grpc,
    key: String,
}

impl load::Client for Client {
    fn write(&mut self, number: u64) -> Result<(), RaftError> {
        let mut value = number.to_string().into_bytes();
        value.resize(VALUE_BYTES, b'x');
        self.grpc.put(&self.key, &value)
    }

    fn read(&mut self) -> Result<(), RaftError> {
        match self.grpc.get(&self.key)? {
            true => Ok(()),
            false => Err(RaftError::Wrong("a key is missing".into())),
        }
    }
}

impl Member for Etcd {
    fn leader(&mut self) -> Result<usize, RaftError> {
        let members = &self.members;
        let time = Duration::from_secs(1);
        let at = until("some member of etcd leads", || {
            let at = members.iter().position(|member| {
                Grpc::connect(member.client, time).and_then(|mut grpc| grpc.leads()).unwrap_or(false)
            })?;
            // It leads when it can write, not when it says so.
            let mut grpc = Grpc::connect(members.get(at)?.client, time).ok()?;
            grpc.put("probe", b"x").ok().map(|()| at)
        })?;
        self.leader = members.get(at).map_or(self.leader, |member| member.client);
        Ok(at)
    }

    fn pid(&self, at: usize) -> Option<u32> {
        self.members.get(at).map(|member| member.process.id())
    }

    fn kill(&mut self, at: usize) {
        if let Some(member) = self.members.get_mut(at) {
            member.process.kill().ok();
            member.process.wait().ok();
        }
    }

    fn restart(&mut self, at: usize) -> Result<(), RaftError> {
        let Some(member) = self.members.get_mut(at) else { return Ok(()) };
        member.process = spawn(&member.arguments, &member.folder)?;
        self.caught_up(at)
    }

    fn caught_up(&self, at: usize) -> Result<(), RaftError> {
        let address = self.members.get(at).map(|member| member.client);
        until("a member of etcd answers again", || {
            // A linearizable read is answered by a member that has applied everything.
            Grpc::connect(address?, Duration::from_secs(1)).ok()?.get("probe").ok().map(drop)
        })
    }

    fn create(&self, at: usize, number: u64, time: Duration) -> Result<(), RaftError> {
        let address = self.members.get(at % self.members.len()).map(|member| member.client);
        let address = address.ok_or_else(|| RaftError::Wrong("no such member".into()))?;
        Grpc::connect(address, time)?.put(&format!("f-{number}"), &[b'x'; VALUE_BYTES])
    }

    fn has(&self, number: u64) -> Result<bool, RaftError> {
        Grpc::connect(self.leader, Duration::from_secs(10))?.get(&format!("f-{number}"))
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        for at in 0..self.members.len() {
            self.kill(at);
        }
    }
}

//! What the host tells the guest at boot, and the messages between both over vsock.
//!
//! * At boot: [`GuestConfig`] as JSON in `/blixard.json`, in an archive that the VMM appends to the initramfs.
//! * The *guest link*: one stream that the guest's init opens to port [`LINK_PORT`] of the host (CID 2) as its first deed,
//!   and opens again whenever it breaks. The VMM itself is the other end. It carries [`LinkRecord`]s both ways.
//! * *Exec streams*: the host connects to port [`EXEC_PORT`] of the guest, one connection per command, and both sides send
//!   [`frame`]s. They run from CLI to init; everything between copies bytes without reading them.

use std::collections::BTreeMap;
use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use crate::config::{ConfigError, MacAddr, check};
use crate::health::{Health, HealthCheck};

/// Host port of the guest link.
pub const LINK_PORT: u32 = 1024;
/// Guest port on which init accepts exec streams.
pub const EXEC_PORT: u32 = 1025;
/// Path of the configuration in the guest's first root.
pub const CONFIG_PATH: &str = "/blixard.json";
/// Most arguments or environment entries of a command.
pub const WORDS_MAX: usize = 1024;
/// Most bytes of all arguments and environment entries of a command together.
pub const WORDS_BYTES_MAX: usize = 128 << 10;

/// What `blixard-init` shall do with its guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestConfig {
    /// Host name, 1 to 63 letters, digits and hyphens (RFC 1123 section 2.1).
    pub hostname: String,
    /// The root file system. Absent: stay in the initramfs (tests).
    #[serde(default)]
    pub root: Option<RootConfig>,
    /// Addresses by nic.
    #[serde(default)]
    pub nics: Vec<NicAddresses>,
    /// Name servers, at most 3 (`MAXNS` of resolv.conf).
    #[serde(default)]
    pub resolvers: Vec<IpAddr>,
    /// What to run. Absent: a shell on the console.
    #[serde(default)]
    pub workload: Option<Command>,
    /// How it is found out whether the workload does its work.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub health: Option<HealthCheck>,
}

/// The root: a shared read-only image below, the VM's own writable layer above.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RootConfig {
    /// Serial number of the disk with the image.
    pub image_disk: String,
    /// File system of the image: `erofs`, `squashfs` or `ext4`.
    pub image_fs: String,
    /// Serial number of the disk with the writable ext4 layer. Absent: the layer is in memory.
    #[serde(default)]
    pub volume_disk: Option<String>,
}

/// Addresses of one nic, found by its hardware address.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NicAddresses {
    /// Which nic.
    pub mac: MacAddr,
    /// Addresses with prefix length.
    pub addresses: Vec<(IpAddr, u8)>,
    /// Default gateways, at most one per family.
    #[serde(default)]
    pub gateways: Vec<IpAddr>,
    /// Largest packet in bytes.
    pub mtu: u16,
}

/// A program to run in the guest.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Command {
    /// Program and arguments; at least one. A program without `/` is searched in `PATH`.
    pub args: Vec<String>,
    /// Environment. `PATH`, `HOME` and `TERM` have defaults.
    #[serde(default)]
    pub env: BTreeMap<String, String>,
    /// Working directory; empty means `/`.
    #[serde(default)]
    pub cwd: String,
    /// `user[:group]` by name or number, as in an OCI image; empty means root.
    #[serde(default)]
    pub user: String,
}

/// How a workload or an exec command ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum WorkloadExit {
    /// It exited with this code.
    Code(u8),
    /// This signal ended it.
    Signal(u8),
    /// It could not be started: 126 it is not executable, 127 it was not found (as a shell says it).
    NotStarted(u8),
}

impl WorkloadExit {
    /// The exit code a shell would show: the code, or 128 + signal.
    pub fn shell_code(self) -> u8 {
        match self {
            Self::Code(code) | Self::NotStarted(code) => code,
            Self::Signal(signal) => signal.saturating_add(128),
        }
    }

    fn to_bytes(self) -> [u8; 2] {
        match self {
            Self::Code(code) => [0, code],
            Self::Signal(signal) => [1, signal],
            Self::NotStarted(code) => [2, code],
        }
    }

    fn from_bytes(bytes: &[u8]) -> Option<Self> {
        match bytes {
            [0, code] => Some(Self::Code(*code)),
            [1, signal] => Some(Self::Signal(*signal)),
            [2, code] => Some(Self::NotStarted(*code)),
            _ => None,
        }
    }
}

impl GuestConfig {
    /// Checks ranges and lengths.
    ///
    /// # Errors
    /// The first field that is out of range.
    pub fn validate(&self) -> Result<(), ConfigError> {
        let name = &self.hostname;
        let letters = name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'.');
        check(!name.is_empty() && name.len() <= 63 && letters, "guest.hostname", || {
            "1 to 63 letters, digits, dots and hyphens are possible".into()
        })?;
        check(self.resolvers.len() <= 3, "guest.resolvers", || "more than 3".into())?;
        check(self.nics.len() <= crate::config::NICS_MAX, "guest.nics", || "too many".into())?;
        if let Some(root) = &self.root {
            let known = ["erofs", "squashfs", "ext4"].contains(&root.image_fs.as_str());
            check(known, "guest.root.image_fs", || "erofs, squashfs and ext4 are possible".into())?;
        }
        self.workload.as_ref().map_or(Ok(()), |w| w.validate("guest.workload"))?;
        self.health.as_ref().map_or(Ok(()), |check| check.validate("guest.health"))
    }
}

impl Command {
    /// Checks number and lengths of the words.
    ///
    /// # Errors
    /// The first field of `field` (the name of this command in its surroundings) that is out of range.
    pub fn validate(&self, field: &str) -> Result<(), ConfigError> {
        check(self.args.first().is_some_and(|p| !p.is_empty()), &format!("{field}.args"), || {
            "the program is missing".into()
        })?;
        check(self.args.len() + self.env.len() <= WORDS_MAX, field, || {
            format!("more than {WORDS_MAX} words")
        })?;
        let env = self.env.iter().flat_map(|(k, v)| [k, v]);
        let words = self.args.iter().chain(env).chain([&self.cwd, &self.user]);
        let (mut bytes, mut nul) = (0, false);
        for word in words {
            bytes += word.len();
            nul |= word.contains('\0');
        }
        check(bytes <= WORDS_BYTES_MAX, field, || format!("longer than {WORDS_BYTES_MAX} bytes"))?;
        check(!nul, field, || "contains a NUL character".into())?;
        let names = self.env.keys().all(|k| !k.is_empty() && !k.contains('='));
        check(names, &format!("{field}.env"), || "a name is empty or contains =".into())
    }
}

/// A message on the guest link: `kind u8, 0 u8, length u16 LE, payload`, at most [`LinkRecord::PAYLOAD_MAX`] bytes of payload.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LinkRecord {
    /// Guest → host: init has begun (sent first on each connection).
    Started,
    /// Guest → host: root mounted, network up, workload started, exec streams accepted.
    Ready,
    /// Guest → host: the workload ended.
    WorkloadExited(WorkloadExit),
    /// Guest → host: what keeps init from doing its work; it powers off next.
    Problem(String),
    /// Guest → host: the health of the workload is another one. Only from a guest that was told to look.
    Health(Health),
    /// Host → guest: end the workload (SIGTERM, after a grace time SIGKILL), sync and power off.
    Stop,
    /// Host → guest: this VM goes on from a snapshot or is a fork; who it is now.
    Restored(Identity),
}

/// What a guest that was copied or set back in time has to know.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// Nanoseconds since 1970.
    pub unix_ns: u64,
    /// Random bytes that no other copy has.
    pub seed: [u8; 32],
    /// The host name, at most 63 bytes; empty when it stays as it is.
    pub hostname: String,
}

impl Identity {
    fn encode(&self) -> Vec<u8> {
        [self.unix_ns.to_le_bytes().as_slice(), &self.seed, self.hostname.as_bytes()].concat()
    }

    fn decode(bytes: &[u8]) -> Option<Self> {
        let (time, rest) = bytes.split_first_chunk::<8>()?;
        let (seed, name) = rest.split_first_chunk::<32>()?;
        let hostname = String::from_utf8(name.to_vec()).ok()?;
        let unix_ns = u64::from_le_bytes(*time);
        (hostname.len() <= 63).then_some(Self { unix_ns, seed: *seed, hostname })
    }
}

/// Bytes on the guest link that are no record.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("guest link: kind {kind} with {length} bytes is no record")]
pub struct NotALinkRecord {
    /// First byte.
    pub kind: u8,
    /// Length field.
    pub length: u16,
}

impl LinkRecord {
    /// Longest payload in bytes.
    pub const PAYLOAD_MAX: usize = 512;
    /// Length of the header in bytes.
    pub const HEADER: usize = 4;

    /// The record as bytes. A problem text is cut to [`Self::PAYLOAD_MAX`] bytes.
    pub fn encode(&self) -> Vec<u8> {
        let (kind, payload): (u8, Vec<u8>) = match self {
            Self::Started => (1, vec![]),
            Self::Ready => (2, vec![]),
            Self::WorkloadExited(exit) => (3, exit.to_bytes().into()),
            Self::Problem(text) => (4, text.bytes().take(Self::PAYLOAD_MAX).collect()),
            Self::Health(health) => (5, health.encode()),
            Self::Stop => (16, vec![]),
            Self::Restored(identity) => (17, identity.encode()),
        };
        let length = u16::try_from(payload.len()).unwrap_or(0).to_le_bytes();
        [&[kind, 0], length.as_slice(), &payload].concat()
    }

    /// Takes one record from the front of `buffer`; `None` when it is not yet complete. `buffer` needs at most
    /// `HEADER + PAYLOAD_MAX` bytes to hold any record.
    ///
    /// # Errors
    /// The bytes are no record: the stream is to be closed.
    pub fn decode(buffer: &mut Vec<u8>) -> Result<Option<Self>, NotALinkRecord> {
        let [kind, _, low, high, ..] = buffer.as_slice() else { return Ok(None) };
        let (kind, length) = (*kind, u16::from_le_bytes([*low, *high]));
        let end = Self::HEADER + usize::from(length);
        let wrong = NotALinkRecord { kind, length };
        if usize::from(length) > Self::PAYLOAD_MAX {
            return Err(wrong);
        }
        let Some(payload) = buffer.get(Self::HEADER..end) else { return Ok(None) };
        let record = match (kind, payload) {
            (1, []) => Self::Started,
            (2, []) => Self::Ready,
            (3, bytes) => Self::WorkloadExited(WorkloadExit::from_bytes(bytes).ok_or(wrong)?),
            (4, text) => Self::Problem(String::from_utf8_lossy(text).into_owned()),
            (5, bytes) => Self::Health(Health::decode(bytes).ok_or(wrong)?),
            (16, []) => Self::Stop,
            (17, bytes) => Self::Restored(Identity::decode(bytes).ok_or(wrong)?),
            _ => return Err(wrong),
        };
        buffer.drain(..end);
        Ok(Some(record))
    }
}

/// Frames of an exec stream: `kind u8, 0 u8, 0 u16, length u32 LE, payload`, at most [`frame::PAYLOAD_MAX`] bytes of payload.
pub mod frame {
    use serde::{Deserialize, Serialize};

    use super::{Command, WorkloadExit};

    /// Longest payload in bytes.
    pub const PAYLOAD_MAX: usize = 256 << 10;
    /// Length of the header in bytes.
    pub const HEADER: usize = 8;

    /// First frame of a stream: what to run.
    #[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
    pub struct ExecRequest {
        /// The program.
        pub command: Command,
        /// Give it a terminal of this size (columns, rows); standard error then arrives with standard output.
        #[serde(default)]
        pub terminal: Option<(u16, u16)>,
        /// Standard input follows in frames; otherwise it is empty.
        #[serde(default)]
        pub stdin: bool,
    }

    /// One frame.
    #[derive(Debug, Clone, PartialEq, Eq)]
    pub enum Frame {
        /// Host → guest, first: what to run.
        Start(ExecRequest),
        /// Host → guest: bytes for standard input; no bytes mean its end.
        Stdin(Vec<u8>),
        /// Host → guest: the terminal has a new size (columns, rows).
        Resize(u16, u16),
        /// Host → guest: send this signal to the command.
        Signal(u8),
        /// Guest → host: bytes from standard output (or the terminal).
        Stdout(Vec<u8>),
        /// Guest → host: bytes from standard error.
        Stderr(Vec<u8>),
        /// Guest → host, last: how it ended.
        Exit(WorkloadExit),
        /// Guest → host, last: why the request was refused.
        Refused(String),
    }

    /// Bytes that are no frame: the stream is to be closed.
    #[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
    #[error("exec stream: kind {kind} with {length} bytes is no frame")]
    pub struct NotAFrame {
        /// First byte.
        pub kind: u8,
        /// Length field.
        pub length: u32,
    }

    /// Kind and payload length of the frame that begins with `header`.
    ///
    /// # Errors
    /// The length is over [`PAYLOAD_MAX`].
    pub fn decode_header(header: [u8; HEADER]) -> Result<(u8, usize), NotAFrame> {
        let [kind, _, _, _, a, b, c, d] = header;
        let length = u32::from_le_bytes([a, b, c, d]);
        match usize::try_from(length) {
            Ok(n) if n <= PAYLOAD_MAX => Ok((kind, n)),
            _ => Err(NotAFrame { kind, length }),
        }
    }

    fn header(kind: u8, length: usize) -> [u8; HEADER] {
        let [a, b, c, d] = u32::try_from(length).unwrap_or(u32::MAX).to_le_bytes();
        [kind, 0, 0, 0, a, b, c, d]
    }

    impl Frame {
        /// The frame as bytes. The caller keeps payloads at or below [`PAYLOAD_MAX`].
        ///
        /// # Errors
        /// The request cannot be written as JSON.
        pub fn encode(&self, json: impl Fn(&ExecRequest) -> Option<Vec<u8>>) -> Option<Vec<u8>> {
            let (kind, payload): (u8, Vec<u8>) = match self {
                Self::Start(request) => (1, json(request)?),
                Self::Stdin(bytes) => (2, bytes.clone()),
                Self::Resize(columns, rows) => (3, [columns.to_le_bytes(), rows.to_le_bytes()].concat()),
                Self::Signal(signal) => (4, vec![*signal]),
                Self::Stdout(bytes) => (16, bytes.clone()),
                Self::Stderr(bytes) => (17, bytes.clone()),
                Self::Exit(exit) => (18, exit.to_bytes().into()),
                Self::Refused(reason) => (19, reason.clone().into_bytes()),
            };
            if payload.len() > PAYLOAD_MAX {
                return None;
            }
            Some([header(kind, payload.len()).as_slice(), &payload].concat())
        }

        /// The frame of this kind and payload.
        ///
        /// # Errors
        /// There is no such frame.
        pub fn decode(
            kind: u8,
            payload: Vec<u8>,
            json: impl Fn(&[u8]) -> Option<ExecRequest>,
        ) -> Result<Self, NotAFrame> {
            let wrong = || NotAFrame { kind, length: u32::try_from(payload.len()).unwrap_or(u32::MAX) };
            match (kind, payload.as_slice()) {
                (1, text) => json(text).map(Self::Start).ok_or_else(wrong),
                (2, _) => Ok(Self::Stdin(payload)),
                (3, [a, b, c, d]) => {
                    Ok(Self::Resize(u16::from_le_bytes([*a, *b]), u16::from_le_bytes([*c, *d])))
                }
                (4, [signal]) => Ok(Self::Signal(*signal)),
                (16, _) => Ok(Self::Stdout(payload)),
                (17, _) => Ok(Self::Stderr(payload)),
                (18, bytes) => WorkloadExit::from_bytes(bytes).map(Self::Exit).ok_or_else(wrong),
                (19, text) => Ok(Self::Refused(String::from_utf8_lossy(text).into_owned())),
                _ => Err(wrong()),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::frame::{ExecRequest, Frame};
    use super::*;
    use crate::health::HealthState;

    fn round_trip(frame: &Frame) -> Frame {
        let bytes = frame.encode(|r| serde_json::to_vec(r).ok()).unwrap();
        let (kind, length) = frame::decode_header(bytes[..8].try_into().unwrap()).unwrap();
        assert_eq!(bytes.len(), 8 + length);
        Frame::decode(kind, bytes[8..].to_vec(), |t| serde_json::from_slice(t).ok()).unwrap()
    }

    #[test]
    fn each_frame_survives_its_bytes() {
        let command = Command { args: vec!["sh".into()], ..Command::default() };
        let request = ExecRequest { command, terminal: Some((80, 25)), stdin: true };
        for frame in [
            Frame::Start(request),
            Frame::Stdin(vec![]),
            Frame::Resize(300, 2),
            Frame::Signal(9),
            Frame::Stdout(vec![1, 2]),
            Frame::Stderr(vec![3]),
            Frame::Exit(WorkloadExit::Signal(15)),
            Frame::Refused("no".into()),
        ] {
            assert_eq!(round_trip(&frame), frame);
        }
    }

    #[test]
    fn an_overlong_frame_is_refused_before_it_is_read() {
        assert!(frame::decode_header([2, 0, 0, 0, 0xff, 0xff, 0xff, 0x7f]).is_err());
    }

    #[test]
    fn a_command_without_a_program_or_with_a_nul_is_refused() {
        let mut command = Command::default();
        assert_eq!(command.validate("c").unwrap_err().field, "c.args");
        command.args = vec!["a\0b".into()];
        assert_eq!(command.validate("c").unwrap_err().field, "c");
    }

    proptest! {
        #[test]
        fn link_records_survive_being_cut_anywhere(cut in 0usize..40, text in "[a-z]{0,20}") {
            let records = [
                LinkRecord::Started, LinkRecord::Problem(text), LinkRecord::Ready,
                LinkRecord::WorkloadExited(WorkloadExit::Code(3)), LinkRecord::Stop,
                LinkRecord::Health(Health { state: HealthState::Unhealthy, output: "no answer".into() }),
                LinkRecord::Restored(Identity { unix_ns: 7, seed: [3; 32], hostname: "web-1".into() }),
            ];
            let bytes: Vec<u8> = records.iter().flat_map(LinkRecord::encode).collect();
            let cut = cut.min(bytes.len());
            let (mut buffer, mut seen) = (vec![], vec![]);
            for part in [&bytes[..cut], &bytes[cut..]] {
                buffer.extend_from_slice(part);
                while let Some(record) = LinkRecord::decode(&mut buffer).unwrap() {
                    seen.push(record);
                }
            }
            prop_assert_eq!(seen.as_slice(), records.as_slice());
        }

        #[test]
        fn arbitrary_bytes_never_panic(mut bytes in proptest::collection::vec(any::<u8>(), 0..700)) {
            while let Ok(Some(_)) = LinkRecord::decode(&mut bytes) {}
        }
    }
}

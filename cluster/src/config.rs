//! What a node is told at its start: by command line, and for what is not said there by a file.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};

use blixard_api::token::JoinToken;
use blixard_netd_api::Subnet;
use clap::Parser;
use serde::Deserialize;

use crate::raft::ELECTION_TIMEOUT_MS;
use crate::state::records::{LEASE_MS, LEASES_MS};

/// The cluster process of a Blixard node. It needs no privileges: an agent on the same host does what needs them.
#[derive(Debug, Clone, Default, Parser, Deserialize)]
#[command(name = "blixard-node", version)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Options {
    /// Folder of the log, the state and images [default: /var/lib/blixard/node]
    #[arg(long, value_name = "DIR")]
    pub state: Option<PathBuf>,
    /// Socket of the agent [default: /run/blixard/agent.sock]
    #[arg(long, value_name = "PATH")]
    pub agent: Option<PathBuf>,
    /// Socket of the API [default: /run/blixard/node.sock]
    #[arg(long, value_name = "PATH")]
    pub socket: Option<PathBuf>,
    /// Mode of the API's socket, octal: who may connect may do everything [default: 0660]
    #[arg(long, value_name = "MODE")]
    pub socket_mode: Option<String>,
    /// Group of the API's socket [default: that of the process]
    #[arg(long, value_name = "GROUP")]
    pub socket_group: Option<String>,
    /// Also answer at this TCP address of this host; every user of the host may then do everything
    #[arg(long, value_name = "127.0.0.1:PORT")]
    pub listen: Option<SocketAddr>,
    /// Address of this host by which other nodes and users with a token reach this node, over TLS
    #[arg(long, value_name = "ADDRESS:PORT")]
    pub address: Option<SocketAddr>,
    /// Where to listen for them, when that is another address
    #[arg(long, value_name = "ADDRESS:PORT")]
    pub bind: Option<SocketAddr>,
    /// Join the cluster of this token, at the first start; needs --address
    #[arg(long, value_name = "TOKEN", env = "BLIXARD_JOIN", hide_env_values = true)]
    pub join: Option<String>,
    /// Where this node stands, for example zone=a or rack=7
    #[arg(long = "label", value_name = "KEY=VALUE")]
    #[serde(default)]
    pub labels: Vec<String>,
    /// When a majority of the voters is lost for ever: make this node, which must not run, the only voter, and end
    #[arg(long)]
    #[serde(skip)]
    pub force_new_cluster: bool,
    /// Name of this node [default: the host's name]
    #[arg(long, value_name = "NAME")]
    pub name: Option<String>,
    /// Program that becomes PID 1 of guests [default: blixard-init beside this program]
    #[arg(long, value_name = "PATH")]
    pub init: Option<PathBuf>,
    /// Name server for guests, up to 3 times [default: what the host uses, when guests can reach it]
    #[arg(long = "resolver", value_name = "ADDRESS")]
    #[serde(default)]
    pub resolvers: Vec<IpAddr>,
    /// Gateway and prefix of the default network, taken when the cluster is made [default: 10.88.0.1/16]
    #[arg(long, value_name = "ADDRESS/BITS")]
    pub network_v4: Option<String>,
    /// The same for IPv6 [default: a random unique local prefix]
    #[arg(long, value_name = "ADDRESS/BITS")]
    pub network_v6: Option<String>,
    /// Cut the log after this many entries [default: 1000]
    #[arg(long, value_name = "ENTRIES")]
    pub snapshot_after: Option<u64>,
    /// A voter stands for election when it has not heard of the leader for so long, or up to 40 % longer, in milliseconds; the
    /// leader sends three to four times as often. More where hosts or the network between them are slow; the same on all
    /// [default: 250]
    #[arg(long, value_name = "MS")]
    pub election_timeout: Option<u64>,
    /// How long VMs that may be started elsewhere run on while their host hears from no majority of the voters, in milliseconds;
    /// taken when the cluster is made. More where a node takes long to start again: its VMs move when it takes longer
    /// [default: 5000]
    #[arg(long, value_name = "MS")]
    pub lease: Option<u64>,
    /// File with the same settings, in TOML
    #[arg(long, value_name = "FILE")]
    #[serde(skip)]
    pub config: Option<PathBuf>,
}

/// What is wrong with the settings.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read {path}")]
    Read {
        /// Which.
        path: PathBuf,
        /// The system's answer.
        #[source]
        source: std::io::Error,
    },
    /// The file is not of the form.
    #[error("cannot understand {path}")]
    Parse {
        /// Which.
        path: PathBuf,
        /// What is wrong.
        #[source]
        source: Box<toml::de::Error>,
    },
    /// A setting has an impossible value.
    #[error("{setting} {value:?}: {possible}")]
    Value {
        /// Which.
        setting: &'static str,
        /// The value.
        value: String,
        /// What is possible.
        possible: String,
    },
}

/// Settings with everything filled in.
#[derive(Debug, Clone)]
pub struct Config {
    /// Folder of the log, the state and images.
    pub state: PathBuf,
    /// Socket of the agent.
    pub agent: PathBuf,
    /// Socket of the API.
    pub socket: PathBuf,
    /// Mode of the API's socket.
    pub socket_mode: u32,
    /// Group of the API's socket.
    pub socket_group: Option<String>,
    /// TCP address, if any.
    pub listen: Option<SocketAddr>,
    /// Address for other nodes and users, and where to listen for them.
    pub address: Option<(SocketAddr, SocketAddr)>,
    /// Token of the cluster to join.
    pub join: Option<JoinToken>,
    /// Where this node stands.
    pub labels: BTreeMap<String, String>,
    /// Make this node the only voter, and end.
    pub force_new_cluster: bool,
    /// Name of this node.
    pub name: String,
    /// Program that becomes PID 1 of guests.
    pub init: PathBuf,
    /// Name servers for guests.
    pub resolvers: Vec<IpAddr>,
    /// IPv4 of the default network.
    pub network_v4: Subnet,
    /// IPv6 of the default network; absent: a random prefix when the cluster is made.
    pub network_v6: Option<Subnet>,
    /// Log entries between snapshots.
    pub snapshot_after: u64,
    /// Silence of the leader after which a voter stands for election, in milliseconds.
    pub election_timeout_ms: u64,
    /// How long a lease lasts, in a cluster that this node makes.
    pub lease_ms: u64,
}

/// Possible election timeouts in milliseconds. Leases (5 s) have to outlast an election.
const ELECTION_TIMEOUTS_MS: std::ops::RangeInclusive<u64> = 100..=2_000;
/// Most name servers (`MAXNS` of resolv.conf).
const RESOLVERS_MAX: usize = 3;

impl Options {
    /// Fills in what the command line left open: from the file, then from defaults.
    ///
    /// # Errors
    /// See [`ConfigError`].
    pub fn complete(mut self) -> Result<Config, ConfigError> {
        if let Some(path) = self.config.take() {
            let read = |source| ConfigError::Read { path: path.clone(), source };
            let text = std::fs::read_to_string(&path).map_err(read)?;
            let parse = |source| ConfigError::Parse { path: path.clone(), source: Box::new(source) };
            self = self.or(toml::from_str(&text).map_err(parse)?);
        }
        let mode = self.socket_mode.as_deref().unwrap_or("0660");
        let socket_mode = u32::from_str_radix(mode, 8)
            .ok()
            .filter(|m| *m <= 0o777)
            .ok_or_else(|| wrong("socket-mode", mode, "an octal number up to 0777 is needed"))?;
        let name = self.name.unwrap_or_else(host_name);
        blixard_api::check_name(&name, false).map_err(|form| wrong("name", &name, &form))?;
        let resolvers = if self.resolvers.is_empty() { host_resolvers() } else { self.resolvers };
        if resolvers.len() > RESOLVERS_MAX {
            let count = resolvers.len().to_string();
            return Err(wrong("resolver", &count, "at most 3 are possible"));
        }
        let join = self.join.map(|text| text.parse::<JoinToken>());
        let join = join.transpose().map_err(|error| wrong("join", "(a token)", &error.to_string()))?;
        if join.is_some() && self.address.is_none() {
            return Err(wrong("join", "(a token)", "--address is needed: other nodes must reach this one"));
        }
        let network_v4 = subnet("network-v4", self.network_v4.as_deref().unwrap_or("10.88.0.1/16"), true)?;
        let network_v6 = self.network_v6.map(|text| subnet("network-v6", &text, false)).transpose()?;
        let election = self.election_timeout.unwrap_or(ELECTION_TIMEOUT_MS);
        if !ELECTION_TIMEOUTS_MS.contains(&election) {
            let form =
                format!("{} to {} ms are possible", ELECTION_TIMEOUTS_MS.start(), ELECTION_TIMEOUTS_MS.end());
            return Err(wrong("election-timeout", &election.to_string(), &form));
        }
        let lease_ms = self.lease.unwrap_or(LEASE_MS);
        if !LEASES_MS.contains(&lease_ms) {
            let form = format!("{} to {} ms are possible", LEASES_MS.start(), LEASES_MS.end());
            return Err(wrong("lease", &lease_ms.to_string(), &form));
        }
        Ok(Config {
            state: self.state.unwrap_or_else(|| "/var/lib/blixard/node".into()),
            agent: self.agent.unwrap_or_else(|| "/run/blixard/agent.sock".into()),
            socket: self.socket.unwrap_or_else(|| "/run/blixard/node.sock".into()),
            socket_mode,
            socket_group: self.socket_group,
            listen: self.listen,
            address: self.address.map(|address| (address, self.bind.unwrap_or(address))),
            join,
            labels: labels(&self.labels)?,
            force_new_cluster: self.force_new_cluster,
            name,
            init: self.init.unwrap_or_else(beside_us),
            resolvers,
            network_v4,
            network_v6,
            snapshot_after: self.snapshot_after.unwrap_or(1000).max(10),
            election_timeout_ms: election,
            lease_ms,
        })
    }

    fn or(self, file: Self) -> Self {
        Self {
            state: self.state.or(file.state),
            agent: self.agent.or(file.agent),
            socket: self.socket.or(file.socket),
            socket_mode: self.socket_mode.or(file.socket_mode),
            socket_group: self.socket_group.or(file.socket_group),
            listen: self.listen.or(file.listen),
            address: self.address.or(file.address),
            bind: self.bind.or(file.bind),
            join: self.join.or(file.join),
            labels: if self.labels.is_empty() { file.labels } else { self.labels },
            force_new_cluster: self.force_new_cluster,
            name: self.name.or(file.name),
            init: self.init.or(file.init),
            resolvers: if self.resolvers.is_empty() { file.resolvers } else { self.resolvers },
            network_v4: self.network_v4.or(file.network_v4),
            network_v6: self.network_v6.or(file.network_v6),
            snapshot_after: self.snapshot_after.or(file.snapshot_after),
            election_timeout: self.election_timeout.or(file.election_timeout),
            lease: self.lease.or(file.lease),
            config: None,
        }
    }
}

fn labels(texts: &[String]) -> Result<BTreeMap<String, String>, ConfigError> {
    let form = "KEY=VALUE of at most 63 letters, digits, hyphens, dots and underscores each is needed";
    let plain = |text: &str| {
        (1..=63).contains(&text.len())
            && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"-._".contains(&b))
    };
    let pair = |text: &String| {
        let pair = text.split_once('=').filter(|(key, value)| plain(key) && plain(value));
        pair.map(|(key, value)| (key.to_owned(), value.to_owned())).ok_or_else(|| wrong("label", text, form))
    };
    texts.iter().map(pair).collect()
}

fn wrong(setting: &'static str, value: &str, possible: &str) -> ConfigError {
    ConfigError::Value { setting, value: value.to_owned(), possible: possible.to_owned() }
}

fn subnet(setting: &'static str, text: &str, v4: bool) -> Result<Subnet, ConfigError> {
    let (bits, form) = if v4 {
        (8..=30, "a gateway and 8 to 30 bits, for example 10.88.0.1/16, are needed")
    } else {
        (48..=104, "a gateway and 48 to 104 bits, for example fd62:1::1/64, are needed")
    };
    let parsed = text.split_once('/').and_then(|(gateway, prefix)| {
        let subnet = Subnet { gateway: gateway.parse().ok()?, prefix: prefix.parse().ok()? };
        (subnet.gateway.is_ipv4() == v4 && bits.contains(&subnet.prefix)).then_some(subnet)
    });
    parsed.ok_or_else(|| wrong(setting, text, form))
}

/// The host's name as a name of ours: its first part, in lower case.
fn host_name() -> String {
    let text = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let first = text.trim().split('.').next().unwrap_or("").to_ascii_lowercase();
    let plain = |c: char| if c.is_ascii_alphanumeric() { c } else { '-' };
    let name: String = first.chars().map(plain).take(63).collect();
    let name = name.trim_matches('-').to_owned();
    if name.is_empty() { "node".to_owned() } else { name }
}

fn beside_us() -> PathBuf {
    let ours = std::env::current_exe().unwrap_or_default();
    ours.parent().unwrap_or(Path::new("/usr/bin")).join("blixard-init")
}

/// The host's name servers that a guest can reach: not those on the host's own loopback.
fn host_resolvers() -> Vec<IpAddr> {
    let text = std::fs::read_to_string("/etc/resolv.conf").unwrap_or_default();
    let servers =
        text.lines().filter_map(|line| line.strip_prefix("nameserver")?.trim().parse::<IpAddr>().ok());
    servers.filter(|address| !address.is_loopback()).take(RESOLVERS_MAX).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_wins_over_the_file_and_the_file_over_defaults() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("node.toml");
        std::fs::write(&file, "name = \"from-file\"\nsocket-mode = \"0600\"\nresolvers = [\"192.0.2.1\"]\n")
            .unwrap();
        let path = file.display().to_string();
        let options = Options::parse_from(["blixard-node", "--config", &path, "--name", "from-line"]);
        let config = options.complete().unwrap();
        assert_eq!(config.name, "from-line");
        assert_eq!(config.socket_mode, 0o600);
        assert_eq!(config.resolvers, ["192.0.2.1".parse::<IpAddr>().unwrap()]);
        assert_eq!(config.network_v4.to_string(), "10.88.0.1/16");
    }

    #[test]
    fn an_unknown_setting_and_an_impossible_value_are_named() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("node.toml");
        std::fs::write(&file, "nmae = \"x\"\n").unwrap();
        let path = file.display().to_string();
        let error = Options::parse_from(["blixard-node", "--config", &path]).complete().unwrap_err();
        assert!(crate::host::chain(&error).contains("nmae"), "{error:?}");
        for (name, value) in [
            ("--socket-mode", "999"),
            ("--name", "A b"),
            ("--network-v4", "10.0.0.1/31"),
            ("--label", "zone"),
            ("--join", "x"),
            ("--election-timeout", "20"),
            ("--lease", "4999"),
        ] {
            assert!(Options::parse_from(["blixard-node", name, value]).complete().is_err(), "{name} {value}");
        }
    }
}

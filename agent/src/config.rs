//! Where things are and who may ask: from the command line, then from a TOML file, then by default.

use std::io;
use std::path::{Path, PathBuf};

use blixard_agent_api::held;
use clap::Args;
use serde::Deserialize;

/// Longest run folder in bytes: the address of a unix socket has 107 (`unix(7)`), of which VM folder and socket name need 46.
const RUN_BYTES_MAX: usize = 60;
/// Largest configuration file in bytes.
const FILE_BYTES_MAX: usize = 1 << 20;

/// What a user may set. Every field has the same name in the configuration file.
#[derive(Debug, Clone, Default, Args, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Settings {
    /// Folder of what outlives a boot: ledger, plan, volumes, content [default: /var/lib/blixard/agent]
    #[arg(long, value_name = "DIR")]
    pub state: Option<PathBuf>,
    /// Folder of sockets [default: /run/blixard]
    #[arg(long, value_name = "DIR")]
    pub run: Option<PathBuf>,
    /// User of the node: the only one that may ask [default: root]
    #[arg(long, value_name = "UID")]
    pub node_uid: Option<u32>,
    /// Socket of netd [default: RUN/netd.sock]
    #[arg(long, value_name = "SOCKET")]
    pub netd: Option<PathBuf>,
    /// File in which the node says until when its lease lasts [default: /run/blixard-node/lease.json]
    #[arg(long, value_name = "FILE")]
    pub node_lease: Option<PathBuf>,
    /// The VMM's program [default: blixard-vmm beside this program]
    #[arg(long, value_name = "FILE")]
    pub vmm: Option<PathBuf>,
    /// First user id for VMs [default: 700000]
    #[arg(long, value_name = "UID")]
    pub uid_base: Option<u32>,
    /// Number of user ids for VMs, and so of VMs [default: 10000]
    #[arg(long, value_name = "N")]
    pub uid_count: Option<u32>,
    /// cgroup v2 folder that is ours alone [default: this process's own cgroup]
    #[arg(long, value_name = "DIR", conflicts_with = "no_cgroup")]
    pub cgroup: Option<PathBuf>,
    /// For developers: VMs run without limits on a host without cgroup v2
    #[arg(long)]
    pub no_cgroup: bool,
}

/// A configuration that was checked.
#[derive(Debug, Clone)]
pub struct Config {
    /// Folder of what outlives a boot.
    pub state: PathBuf,
    /// Folder of sockets.
    pub run: PathBuf,
    /// User of the node.
    pub node_uid: u32,
    /// Socket of netd.
    pub netd: PathBuf,
    /// File in which the node says until when its lease lasts.
    pub node_lease: PathBuf,
    /// The VMM's program.
    pub vmm: PathBuf,
    /// First user id for VMs.
    pub uid_base: u32,
    /// Number of user ids for VMs.
    pub uid_count: u32,
    /// cgroup v2 folder; `None`: this process's own.
    pub cgroup: Option<PathBuf>,
    /// VMs run without limits.
    pub no_cgroup: bool,
}

/// Why a configuration is refused.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// The file is not TOML of this form.
    #[error("cannot understand {path}")]
    Parse {
        /// The file.
        path: PathBuf,
        /// Where and why.
        #[source]
        source: Box<toml::de::Error>,
    },
    /// A value is not possible.
    #[error("{field}: {problem}")]
    Value {
        /// The field.
        field: &'static str,
        /// What is wrong, and what is possible.
        problem: String,
    },
}

fn wrong(field: &'static str, problem: impl Into<String>) -> ConfigError {
    ConfigError::Value { field, problem: problem.into() }
}

fn read(path: &Path) -> Result<Settings, ConfigError> {
    let failed = |source| ConfigError::Read { path: path.into(), source };
    let bytes = crate::durable::read_bounded(path, FILE_BYTES_MAX).map_err(failed)?;
    let bytes = bytes.ok_or_else(|| failed(io::ErrorKind::NotFound.into()))?;
    let text = String::from_utf8(bytes).map_err(|_| failed(io::ErrorKind::InvalidData.into()))?;
    toml::from_str(&text).map_err(|source| ConfigError::Parse { path: path.into(), source: Box::new(source) })
}

impl Config {
    /// The configuration of these settings and, where they say nothing, of the file.
    ///
    /// # Errors
    /// See [`ConfigError`].
    pub fn new(settings: Settings, file: Option<&Path>) -> Result<Self, ConfigError> {
        let from_file = file.map(read).transpose()?.unwrap_or_default();
        let run = settings.run.or(from_file.run).unwrap_or_else(|| "/run/blixard".into());
        let beside = || {
            let own = std::env::current_exe().unwrap_or_default();
            own.with_file_name("blixard-vmm")
        };
        let config = Self {
            state: settings.state.or(from_file.state).unwrap_or_else(|| "/var/lib/blixard/agent".into()),
            node_uid: settings.node_uid.or(from_file.node_uid).unwrap_or(0),
            netd: settings.netd.or(from_file.netd).unwrap_or_else(|| run.join("netd.sock")),
            node_lease: settings
                .node_lease
                .or(from_file.node_lease)
                .unwrap_or_else(|| Path::new("/run/blixard-node").join(held::FILE)),
            vmm: settings.vmm.or(from_file.vmm).unwrap_or_else(beside),
            uid_base: settings.uid_base.or(from_file.uid_base).unwrap_or(700_000),
            uid_count: settings.uid_count.or(from_file.uid_count).unwrap_or(10_000),
            cgroup: settings.cgroup.or(from_file.cgroup),
            no_cgroup: settings.no_cgroup || from_file.no_cgroup,
            run,
        };
        config.check()?;
        Ok(config)
    }

    fn check(&self) -> Result<(), ConfigError> {
        let folders =
            [("state", Some(&self.state)), ("run", Some(&self.run)), ("cgroup", self.cgroup.as_ref())];
        for (field, folder) in folders {
            if folder.is_some_and(|folder| !folder.is_absolute()) {
                return Err(wrong(field, "an absolute path is needed"));
            }
        }
        if self.run.as_os_str().len() > RUN_BYTES_MAX {
            return Err(wrong("run", format!("at most {RUN_BYTES_MAX} bytes are possible")));
        }
        // 65,536 and above: below live users of the host.
        let last = self.uid_base.checked_add(self.uid_count);
        if self.uid_base < 65_536 || self.uid_count == 0 || last.is_none_or(|last| last > u32::MAX - 16) {
            return Err(wrong("uid_base", "user ids from 65536 up to 4294967279 are possible, at least one"));
        }
        if self.node_uid >= self.uid_base && Some(self.node_uid) < last {
            return Err(wrong("node_uid", "is one of the user ids for VMs"));
        }
        Ok(())
    }

    /// The folder with the sockets of one VM.
    pub fn sockets_of(&self, vm: blixard_vmm_api::VmId) -> PathBuf {
        self.run.join("vm").join(vm.to_string())
    }

    /// The folder with the files of one VM.
    pub fn files_of(&self, vm: blixard_vmm_api::VmId) -> PathBuf {
        self.state.join("vm").join(vm.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_wins_over_the_file_and_the_file_over_the_default() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("agent.toml");
        std::fs::write(&file, "state = \"/a\"\nrun = \"/b\"\n").unwrap();
        let settings = Settings { run: Some("/c".into()), ..Settings::default() };
        let config = Config::new(settings, Some(&file)).unwrap();
        assert_eq!((config.state, config.run), ("/a".into(), "/c".into()));
        assert_eq!(config.netd, PathBuf::from("/c/netd.sock"));
    }

    #[test]
    fn a_wrong_value_is_refused_with_the_name_of_its_field() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("agent.toml");
        let refused = |text: &str| {
            std::fs::write(&file, text).unwrap();
            Config::new(Settings::default(), Some(&file)).unwrap_err()
        };
        assert!(refused("uid_base = 5").to_string().starts_with("uid_base"));
        assert!(refused("run = \"x\"").to_string().starts_with("run"));
        assert!(refused(&format!("run = \"/{}\"", "x".repeat(80))).to_string().starts_with("run"));
        assert!(refused("node_uid = 700001").to_string().starts_with("node_uid"));
        let unknown = refused("uid_bas = 5");
        assert!(std::error::Error::source(&unknown).unwrap().to_string().contains("uid_bas"));
    }
}

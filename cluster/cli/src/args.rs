//! The command line: commands, options and how their values are read.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::health::HealthOptions;
use crate::node::Place;
use crate::{cluster, units};

/// Private microVM cloud: `blixard run IMAGE` gives you a virtual machine with a kernel of its own.
#[derive(Debug, Parser)]
#[command(name = "blixard", version, propagate_version = false, max_term_width = 110)]
#[command(
    after_help = "Exit codes: 0 ok, 1 error, 2 usage, 3 not found, 4 conflict, 5 no capacity, 6 timeout, \
    7 denied; exec and run pass on the code of the command, 125 is a failure of their own, 126 not executable, \
    127 no such command."
)]
pub struct Cli {
    #[command(flatten)]
    pub global: Global,
    #[command(subcommand)]
    pub command: Command,
}

/// Options of every command.
#[derive(Debug, Clone, Args)]
pub struct Global {
    /// Address of the node: unix:///PATH, https://HOST:PORT with a token, or http://HOST:PORT
    #[arg(short = 'H', long, global = true, env = "BLIXARD_HOST", value_name = "URL",
        default_value = blixard_api::client::DEFAULT_HOST)]
    pub host: String,
    /// Token for https:// (blixard token create NAME)
    #[arg(long, global = true, env = "BLIXARD_TOKEN", value_name = "TOKEN", hide_env_values = true)]
    pub token: Option<String>,
    /// Project
    #[arg(short, long, global = true, env = "BLIXARD_PROJECT", value_name = "NAME",
        default_value = blixard_api::DEFAULT_PROJECT)]
    pub project: String,
    /// Form of the output
    #[arg(short, long, global = true, value_enum, value_name = "FORM", default_value = "table")]
    pub output: Format,
    /// Print ids or names only, no progress
    #[arg(short, long, global = true)]
    pub quiet: bool,
}

/// Form of the output.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// Columns for people
    Table,
    /// More columns
    Wide,
    /// JSON, errors too
    Json,
    /// YAML
    Yaml,
    /// Names, one per line
    Name,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Make a VM from an image and start it
    Run(Box<Run>),
    /// List VMs
    #[command(visible_alias = "ls")]
    Ps(Ps),
    /// Show what VMs wrote to their console
    Logs(Logs),
    /// Run a command inside a VM
    Exec(Exec),
    /// Use the serial console of a VM (detach: ctrl-p ctrl-q)
    #[command(visible_alias = "attach")]
    Console(One),
    /// Stop VMs in good order
    Stop(Stop),
    /// Start stopped VMs
    Start(Start),
    /// Remove VMs
    Rm(Remove),
    /// Show all about VMs (a JSON array)
    Inspect(Many),
    /// Wait for VMs and print how their workloads ended
    Wait(WaitFor),
    /// Root file systems: import, list, remove
    #[command(subcommand)]
    Image(Image),
    /// Guest kernels: import, list, remove
    #[command(subcommand)]
    Kernel(Kernel),
    /// The cluster: let others join, status, leadership, join tokens
    #[command(subcommand)]
    Cluster(cluster::Cluster),
    /// Let this node leave its own empty cluster and join another one
    Join(cluster::Join),
    /// Nodes: list, show, cordon, remove
    #[command(subcommand)]
    Node(cluster::Node),
    /// Tokens for the API over TLS: make, list, revoke
    #[command(subcommand)]
    Token(cluster::ApiTokens),
    /// Check this host, and say how to fix what is wrong
    Doctor(Doctor),
    /// Run a whole one-node cluster in the foreground (needs root)
    Dev(Dev),
    /// Show the versions of this program and of the node
    Version,
    /// Print a completion script for a shell
    Completion {
        /// bash, zsh, fish, elvish or powershell
        shell: clap_complete::Shell,
    },
}

/// One VM.
#[derive(Debug, Args)]
pub struct One {
    /// Name, id or unambiguous beginning of an id
    pub vm: String,
}

/// Some VMs.
#[derive(Debug, Args)]
pub struct Many {
    /// Names, ids or unambiguous beginnings of ids
    #[arg(required = true, value_name = "VM")]
    pub vms: Vec<String>,
}

/// Options of `run`.
#[derive(Debug, Args)]
pub struct Run {
    /// Print the id and return; otherwise the console is shown until the VM has ended
    #[arg(short, long)]
    pub detach: bool,
    /// Remove the VM when it has ended
    #[arg(long, conflicts_with = "detach")]
    pub rm: bool,
    /// Connect standard input to the console
    #[arg(short, long, conflicts_with = "detach")]
    pub interactive: bool,
    /// Use this terminal for the console, byte by byte (detach: ctrl-p ctrl-q)
    #[arg(short, long, conflicts_with = "detach")]
    pub tty: bool,
    /// Name, unique in the project; otherwise one is made from the id
    #[arg(long)]
    pub name: Option<String>,
    /// Number of vCPUs
    #[arg(long, visible_alias = "cpus", value_name = "N", default_value = "1")]
    pub vcpus: u32,
    /// Memory, for example 256M or 1G
    #[arg(short, long, value_name = "SIZE", default_value = "256M", value_parser = units::parse_mib_u32)]
    pub memory: u32,
    /// Size of the writable disk, for example 1G
    #[arg(long, value_name = "SIZE", default_value = "1G", value_parser = units::parse_mib)]
    pub disk: u64,
    /// Environment variable; a bare NAME takes its value from here
    #[arg(short, long, value_name = "NAME=VALUE", value_parser = units::parse_env)]
    pub env: Vec<(String, String)>,
    /// Working directory
    #[arg(short, long, value_name = "DIR")]
    pub workdir: Option<String>,
    /// User, as name or number, and group if wanted: USER or USER:GROUP
    #[arg(short, long)]
    pub user: Option<String>,
    /// Program instead of the image's entry point
    #[arg(long, value_name = "PROGRAM")]
    pub entrypoint: Option<String>,
    /// Guest kernel
    #[arg(long, value_name = "NAME")]
    pub kernel: Option<String>,
    /// Network: `default` or `none`
    #[arg(long, value_name = "NAME")]
    pub network: Option<String>,
    /// Label
    #[arg(short, long, value_name = "KEY=VALUE", value_parser = units::parse_label)]
    pub label: Vec<(String, String)>,
    /// Words to add to the kernel's command line
    #[arg(long, value_name = "WORDS", default_value = "", hide_default_value = true)]
    pub cmdline: String,
    #[command(flatten)]
    pub place: Place,
    #[command(flatten)]
    pub health: HealthOptions,
    /// With --detach: what to wait for before returning
    #[arg(long, value_enum, value_name = "MOMENT", default_value = "none")]
    pub wait: StartWait,
    /// Longest time to wait for that
    #[arg(long, value_name = "TIME", default_value = "60s", value_parser = units::parse_duration)]
    pub timeout: Duration,
    /// Image
    pub image: String,
    /// Command and arguments instead of the image's
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "COMMAND")]
    pub command: Vec<String>,
}

/// What a start is waited for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum StartWait {
    /// The guest answers `exec` (or has already ended)
    Ready,
    /// Nothing: the node has accepted it
    None,
}

/// Options of `ps`.
#[derive(Debug, Args)]
pub struct Ps {
    /// Also those that have stopped
    #[arg(short, long)]
    pub all: bool,
    /// Only those with this label
    #[arg(short, long, value_name = "KEY=VALUE", value_parser = units::parse_label)]
    pub label: Vec<(String, String)>,
    /// Go on and show each change
    #[arg(short, long)]
    pub watch: bool,
}

/// Options of `logs`.
#[derive(Debug, Args)]
pub struct Logs {
    /// Go on until the VM has ended
    #[arg(short, long)]
    pub follow: bool,
    /// Only the last lines
    #[arg(short = 'n', long, value_name = "LINES")]
    pub tail: Option<u64>,
    #[command(flatten)]
    pub vm: One,
}

/// Options of `exec`.
#[derive(Debug, Args)]
pub struct Exec {
    /// Connect standard input
    #[arg(short, long)]
    pub interactive: bool,
    /// Give the command a terminal
    #[arg(short, long)]
    pub tty: bool,
    /// Environment variable; a bare NAME takes its value from here
    #[arg(short, long, value_name = "NAME=VALUE", value_parser = units::parse_env)]
    pub env: Vec<(String, String)>,
    /// Working directory
    #[arg(short, long, value_name = "DIR", default_value = "", hide_default_value = true)]
    pub workdir: String,
    /// User, as name or number, and group if wanted: USER or USER:GROUP
    #[arg(short, long, default_value = "", hide_default_value = true)]
    pub user: String,
    #[command(flatten)]
    pub vm: One,
    /// Command and arguments
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
    pub command: Vec<String>,
}

/// Whether and how long to wait for what was asked.
#[derive(Debug, Clone, Args)]
pub struct Patience {
    /// Return only when it is done (this is so unless --no-wait is given)
    #[arg(long, conflicts_with = "no_wait")]
    pub wait: bool,
    /// Return when the node has accepted the request
    #[arg(long)]
    pub no_wait: bool,
    /// Longest time to wait until it is done
    #[arg(long, value_name = "TIME", default_value = "60s", value_parser = units::parse_duration)]
    pub timeout: Duration,
}

/// Options of `stop`.
#[derive(Debug, Args)]
pub struct Stop {
    /// Seconds that the guest has to end by itself (0: end it at once)
    #[arg(short, long, value_name = "SECONDS", default_value = "10")]
    pub time: u32,
    #[command(flatten)]
    pub patience: Patience,
    #[command(flatten)]
    pub vms: Many,
}

/// Options of `start`.
#[derive(Debug, Args)]
pub struct Start {
    /// What to wait for before returning
    #[arg(long, value_enum, value_name = "MOMENT", default_value = "ready")]
    pub wait: StartWait,
    /// Longest time to wait for that
    #[arg(long, value_name = "TIME", default_value = "60s", value_parser = units::parse_duration)]
    pub timeout: Duration,
    #[command(flatten)]
    pub vms: Many,
}

/// Options of `rm`.
#[derive(Debug, Args)]
pub struct Remove {
    /// Also when it runs
    #[arg(short, long)]
    pub force: bool,
    #[command(flatten)]
    pub patience: Patience,
    #[command(flatten)]
    pub vms: Many,
}

/// Options of `wait`.
#[derive(Debug, Args)]
pub struct WaitFor {
    /// What to wait for
    #[arg(long = "for", value_enum, value_name = "MOMENT", default_value = "stopped")]
    pub until: Moment,
    /// Longest time to wait; without it as long as it takes
    #[arg(long, value_name = "TIME", value_parser = units::parse_duration)]
    pub timeout: Option<Duration>,
    #[command(flatten)]
    pub vms: Many,
}

/// A moment in the life of a VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Moment {
    /// The guest answers `exec`
    Ready,
    /// Its health check has succeeded
    Healthy,
    /// It has ended
    Stopped,
    /// It is removed
    Gone,
}

/// Commands of `image`.
#[derive(Debug, Subcommand)]
pub enum Image {
    /// Import a root file system: a tar file, a docker archive, a folder with an OCI layout, or - for a tar on stdin
    Import {
        /// Name; otherwise it is made from the file name
        #[arg(long)]
        name: Option<String>,
        /// File, folder or -
        source: PathBuf,
    },
    /// List images
    #[command(visible_alias = "list")]
    Ls,
    /// Remove images
    Rm {
        /// Names
        #[arg(required = true, value_name = "IMAGE")]
        names: Vec<String>,
    },
    /// Show all about images (a JSON array)
    Inspect {
        /// Names
        #[arg(required = true, value_name = "IMAGE")]
        names: Vec<String>,
    },
}

/// Commands of `kernel`.
#[derive(Debug, Subcommand)]
pub enum Kernel {
    /// Import a guest kernel with its modules; without options the one this host runs
    Import {
        /// Kernel file (bzImage or ELF vmlinux)
        #[arg(long, value_name = "FILE", requires = "modules", conflicts_with = "release")]
        kernel: Option<PathBuf>,
        /// Its modules, for example /lib/modules/6.1.0-1-amd64
        #[arg(long, value_name = "DIR", requires = "kernel")]
        modules: Option<PathBuf>,
        /// A release that is installed on this host, as in /lib/modules
        #[arg(long)]
        release: Option<String>,
        /// Name
        #[arg(long, default_value = "default")]
        name: String,
    },
    /// List kernels
    #[command(visible_alias = "list")]
    Ls,
    /// Remove kernels
    Rm {
        /// Names
        #[arg(required = true, value_name = "KERNEL")]
        names: Vec<String>,
    },
    /// Show all about kernels (a JSON array)
    Inspect {
        /// Names
        #[arg(required = true, value_name = "KERNEL")]
        names: Vec<String>,
    },
}

/// Options of `doctor`.
#[derive(Debug, Args)]
pub struct Doctor {
    /// Do what can be done about it (needs root)
    #[arg(long)]
    pub fix: bool,
    /// Folder with the other programs; otherwise the one of this program, then PATH
    #[arg(long, value_name = "DIR")]
    pub bin_dir: Option<PathBuf>,
}

/// Options of `dev`.
#[derive(Debug, Args)]
pub struct Dev {
    /// Folder for what is to stay
    #[arg(long, value_name = "DIR", default_value = "/var/lib/blixard")]
    pub state: PathBuf,
    /// Folder for sockets
    #[arg(long, value_name = "DIR", default_value = "/run/blixard")]
    pub run: PathBuf,
    /// Leave VMs running at the end
    #[arg(long)]
    pub keep: bool,
    /// Do not import this host's kernel when there is no kernel `default`
    #[arg(long)]
    pub no_kernel: bool,
    /// Folder with the other programs; otherwise the one of this program, then PATH
    #[arg(long, value_name = "DIR")]
    pub bin_dir: Option<PathBuf>,
    /// Name of the node; otherwise the host's
    #[arg(long)]
    pub name: Option<String>,
    /// Run this once everything is ready, and end with its exit code
    #[arg(last = true, value_name = "COMMAND")]
    pub command: Vec<String>,
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    fn parse(words: &str) -> Result<Cli, clap::Error> {
        Cli::try_parse_from(std::iter::once("blixard").chain(words.split_whitespace()))
    }

    #[test]
    fn the_definition_of_the_command_line_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn what_users_of_docker_and_kubectl_type_is_understood() {
        for good in [
            "run -d --rm=false img",
            "run -it --rm --name x --cpus 2 -m 512M img sh",
            "run -d --wait ready --timeout 2m --network none --kernel k img",
            "ps -a -l a=b -l c=d -w",
            "ps -aq",
            "-H http://127.0.0.1:1 -p other -o json ps",
            "ps -o wide -p other",
            "logs -f --tail 10 web",
            "logs -n 10 web",
            "exec -it web sh",
            "exec -i -e A=b -w /srv -u 1:2 web cat -n",
            "exec web -- ls -l",
            "console web",
            "stop -t 0 a b c",
            "start --wait none a",
            "start --wait ready a",
            "rm -f a b",
            "rm -f --wait a",
            "rm --no-wait a",
            "wait --for ready --timeout 120s a",
            "inspect a b",
            "image import - --name x",
            "image import x.tar",
            "image ls -q",
            "image rm a b",
            "kernel import",
            "kernel import --release 6.1.0",
            "kernel import --kernel k --modules m --name n",
            "kernel ls",
            "cluster init --address 192.0.2.1:7440",
            "cluster status -o json",
            "cluster transfer-leader",
            "cluster token create --ttl 10m",
            "join blixard-join.x --address 192.0.2.2:7440",
            "node ls -o wide",
            "node rm a b",
            "token create ci --ttl 30m",
            "-H https://192.0.2.1:7440 --token t ps",
            "run --dry-run --explain --constraint zone=a --toleration gpu --anti-affinity web:zone --priority 7 img",
            "run -d --accelerator gpu=2 --preempt cost-aware --restart on-failure --on-node-loss wait img",
            "node cordon a",
            "node drain --grace 60s a",
            "node set --label zone=a --taint gpu:no-schedule --overcommit-memory 150 a",
            "doctor --fix",
            "dev --state s --run r --keep",
            "dev -- make test",
            "version",
            "completion zsh",
        ] {
            // `--rm=false` is the one form that is not ours.
            let parsed = parse(good);
            assert_eq!(parsed.is_ok(), !good.contains("=false"), "{good}: {:?}", parsed.err());
        }
    }

    #[test]
    fn what_cannot_be_meant_is_refused() {
        for wrong in [
            "",
            "run",
            "run -d -i img",
            "run -d --rm img",
            "run -m 512 img",
            "run --timeout soon img",
            "run -e =x img",
            "exec web",
            "stop",
            "stop -t -1 web",
            "rm --wait --no-wait a",
            "kernel import --kernel k",
            "kernel import --release r --kernel k --modules m",
            "ps -o xml",
            "wait --for ever a",
            "image",
        ] {
            let error = parse(wrong).expect_err(wrong);
            assert!(error.use_stderr() || wrong.is_empty() || wrong == "image", "{wrong}");
        }
    }

    #[test]
    fn everything_after_the_name_of_a_vm_is_the_command() {
        let Command::Exec(exec) = parse("exec -i web sh -c -t --name x").unwrap().command else { panic!() };
        assert_eq!(exec.command, ["sh", "-c", "-t", "--name", "x"]);
        assert!(exec.interactive && !exec.tty);
    }
}

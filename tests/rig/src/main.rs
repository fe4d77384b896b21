//! blixard-rig: disposable Debian hosts with hardware-like KVM, for tests that need a real machine.
//!
//! See the `README.md` of this folder for what is emulated and what it costs.

mod accel;
mod cache;
mod guests;
mod image;
mod leash;
mod programs;
mod qcow2;
mod qemu;
mod qmp;
mod recipe;
mod run;
mod say;
mod shell;
mod snapshot;
mod ssh;
mod switch;
mod work;

use clap::{Args, Parser, Subcommand};
use leash::Leash;
use std::error::Error;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

/// Exit code for failures of the rig itself, as container tools have it.
const OWN_FAILURE: u8 = 125;
/// Exit code of `doctor` when programs are missing.
const MISSING: u8 = 3;

/// Disposable Debian hosts with hardware-like KVM, for tests that need a real machine.
#[derive(Parser)]
#[command(name = "blixard-rig", version)]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Build the host image into the cache (once for a recipe)
    Build,
    /// Run a command as root in host 0 of fresh hosts; its exit code is ours
    Run(RunArgs),
    /// Put root file systems for guests (busybox.tar, debian.tar) into a folder
    GuestImages {
        /// Folder, made when missing
        dir: PathBuf,
    },
    /// Remove cached snapshots and what older recipes left
    Clean {
        /// Remove everything, the images too
        #[arg(long)]
        all: bool,
    },
    /// Tell what this machine lacks and which accelerator it offers
    Doctor,
}

#[derive(Args)]
struct RunArgs {
    /// Hosts rig0.. at 10.77.0.1.., with passwordless ssh between them
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=i64::from(qemu::MAX_HOSTS)))]
    hosts: u8,
    /// Processors of each host
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u8).range(1..=64))]
    cpus: u8,
    /// Memory of each host, with the unit M or G
    #[arg(long, default_value = "6G", value_parser = parse_memory)]
    mem: u32,
    /// Folder of this machine that all hosts see, read-write; up to 4 times. The command starts in the first
    #[arg(long, value_name = "DIR:/TARGET", value_parser = parse_share)]
    share: Vec<qemu::Share>,
    /// Seconds until everything is killed, from the start of the hosts (exit code 124)
    #[arg(long, default_value_t = 600, value_parser = clap::value_parser!(u32).range(1..))]
    timeout: u32,
    /// Boot instead of restoring a snapshot
    #[arg(long)]
    boot: bool,
    /// Leave the consoles of the hosts in this folder
    #[arg(long, value_name = "DIR")]
    logs: Option<PathBuf>,
    /// Give the command a terminal
    #[arg(long, short)]
    tty: bool,
    /// One word is a shell script, several are a program and its arguments
    #[arg(required = true, last = true)]
    command: Vec<String>,
}

fn parse_memory(text: &str) -> Result<u32, String> {
    let wrong = || format!("{text:?} is not a size such as 512M or 6G");
    let (number, unit) = text.split_at_checked(text.len().saturating_sub(1)).ok_or_else(wrong)?;
    let factor = match unit {
        "M" => 1,
        "G" => 1024,
        _ => return Err(wrong()),
    };
    let size = number.parse::<u32>().ok().and_then(|n| n.checked_mul(factor)).ok_or_else(wrong)?;
    if size < 512 { Err("a host needs at least 512M".into()) } else { Ok(size) }
}

fn parse_share(text: &str) -> Result<qemu::Share, String> {
    let (folder, target) = text.rsplit_once(':').ok_or("expected DIR:/TARGET")?;
    if !target.starts_with('/') || target == "/" {
        return Err("the target has to be an absolute path, not the root".into());
    }
    let folder = PathBuf::from(folder).canonicalize().map_err(|error| format!("{folder}: {error}"))?;
    if !folder.is_dir() {
        return Err(format!("{} is not a folder", folder.display()));
    }
    Ok(qemu::Share { folder, target: target.to_owned() })
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let leash = match Leash::new() {
        Ok(leash) => leash,
        Err(error) => return fail(&error),
    };
    let result = perform(cli.verb, &leash);
    // A stop explains whatever failed because of it.
    if let Some(stop) = leash.finish() {
        say::say(stop);
        if let (leash::Stop::Limit, Ok(run::HUNG)) = (stop, &result) {
            return ExitCode::from(run::HUNG);
        }
        return ExitCode::from(stop.code());
    }
    match result {
        Ok(code) => ExitCode::from(code),
        Err(error) => fail(&*error),
    }
}

fn fail(error: &dyn Error) -> ExitCode {
    say::say(say::chain(error));
    ExitCode::from(OWN_FAILURE)
}

fn perform(verb: Verb, leash: &Leash) -> Result<u8, Box<dyn Error>> {
    match verb {
        Verb::Doctor => return Ok(doctor(leash)),
        Verb::Build => drop(image::ensure(&cache::Cache::open()?, leash)?),
        Verb::GuestImages { dir } => guests::export(&dir, &cache::Cache::open()?, leash)?,
        Verb::Clean { all } => {
            let keep = [recipe::image_key(), recipe::guests_key()];
            cache::Cache::open()?.clean(all, &keep, leash)?;
        }
        Verb::Run(args) => {
            if args.share.len() > qemu::MAX_SHARES {
                return Err(format!("at most {} folders can be shared", qemu::MAX_SHARES).into());
            }
            programs::check()?;
            let options = run::Options {
                hosts: args.hosts,
                shape: qemu::Shape { cpus: args.cpus, mem: args.mem },
                shares: args.share,
                timeout: Duration::from_secs(args.timeout.into()),
                boot: args.boot,
                logs: args.logs,
                tty: args.tty,
                command: args.command,
            };
            return Ok(run::run(&options, &cache::Cache::open()?, leash)?);
        }
    }
    Ok(0)
}

fn doctor(leash: &Leash) -> u8 {
    let missing = programs::check();
    match &missing {
        Ok(()) => say::say("programs: all there"),
        Err(error) => say::say(error),
    }
    match cache::Cache::open() {
        Ok(cache) => say::say(format_args!("cache: {}", cache.root().display())),
        Err(error) => say::say(say::chain(&error)),
    }
    match accel::Accel::choose(leash) {
        Ok(accel) => say::say(format_args!("accelerator: {} ({})", accel.name, accel.why)),
        Err(error) => say::say(say::chain(&error)),
    }
    if missing.is_ok() { 0 } else { MISSING }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn options_end_where_the_command_begins() {
        let words = ["blixard-rig", "run", "--hosts", "3", "--mem", "8G", "--", "ls", "--all"];
        let Verb::Run(args) = Cli::try_parse_from(words).unwrap().verb else { panic!("not a run") };
        assert_eq!((args.hosts, args.cpus, args.mem), (3, 2, 8192));
        assert_eq!(args.command, ["ls", "--all"]);
    }

    #[test]
    fn wrong_values_are_refused() {
        for words in [
            &["run", "--hosts", "4", "--", "true"][..],
            &["run", "--mem", "6", "--", "true"],
            &["run", "--mem", "100M", "--", "true"],
            &["run", "--mem", "99999999G", "--", "true"],
            &["run", "--share", "/tmp", "--", "true"],
            &["run", "--share", "/tmp:relative", "--", "true"],
            &["run", "--share", "/no/such/folder:/x", "--", "true"],
            &["run", "--timeout", "0", "--", "true"],
            &["run"],
        ] {
            let words = ["blixard-rig"].iter().chain(words);
            assert!(Cli::try_parse_from(words.clone()).is_err(), "{:?}", words.collect::<Vec<_>>());
        }
    }

    #[test]
    fn memory_has_a_unit() {
        assert_eq!(parse_memory("512M"), Ok(512));
        assert_eq!(parse_memory("6G"), Ok(6144));
        assert!(parse_memory("").is_err());
        assert!(parse_memory("6Gö").is_err());
    }
}

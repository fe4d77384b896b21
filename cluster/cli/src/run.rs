//! `run`: makes a VM from an image, and shows it until it has ended.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use blixard_api::client::ClientError;
use blixard_api::vm::{CreateVm, StopVm, VmSpec, VmView};
use blixard_api::{VmId, client};
use tokio::signal::unix::{SignalKind, signal};

use crate::Context;
use crate::args::{Format, Run, StartWait};
use crate::console::{self, ConsoleEnd};
use crate::error::{CliError, code};
use crate::follow::{Subject, ended, exit_code};
use crate::list::now_ms;
use crate::node;
use crate::progress::Progress;
use crate::terminal::RawMode;

/// Longest time until a VM has begun, when its console is waited for.
const BEGIN_TIME: Duration = Duration::from_secs(600);
/// Longest time for the removal after `--rm`.
const REMOVE_TIME: Duration = Duration::from_secs(60);

/// Signals in this time are one: `timeout` and terminals send to a process and to its group.
const ONE_SIGNAL: Duration = Duration::from_millis(300);

/// `run`.
pub async fn run(context: &Context, options: Run) -> Result<u8, CliError> {
    let request = CreateVm {
        id: VmId::from_parts(now_ms(), client::random()?),
        name: options.name.clone(),
        spec: spec(&options)?,
    };
    if options.place.dry_run || options.place.explain {
        return node::explain(context, &request, &options.place).await;
    }
    let created =
        context.client.create_vm(&context.project, &request).await.map_err(|e| advise(e, &options))?;
    if options.detach {
        return detached(context, &options, &created).await;
    }
    // Its id, so that a VM of the same name that somebody makes later is not meant.
    let id = created.id.to_string();
    let subject = Subject { client: &context.client, project: &context.project, name: &id };
    let own = |error| match error {
        CliError::Own(_) => error,
        other => CliError::Own(Box::new(other)),
    };
    let followed = foreground(context, &options, subject).await.map_err(own);
    let Ok(Some(view)) = followed else {
        return followed.map(|_| code::INTERRUPTED);
    };
    let result = exit_code(&view);
    if options.rm {
        context.client.delete_vm(&context.project, &id, true).await.map_err(CliError::from).map_err(own)?;
        subject.wait_gone(REMOVE_TIME).await.map_err(own)?;
    }
    result
}

fn spec(options: &Run) -> Result<VmSpec, CliError> {
    let vcpus = u8::try_from(options.vcpus).map_err(|_| CliError::Value {
        message: format!("{} vCPUs are too many", options.vcpus),
        field: "spec.vcpus",
        possible: "1 to 32 are possible".into(),
    })?;
    let some = |words: &Vec<String>| (!words.is_empty()).then(|| words.clone());
    Ok(VmSpec {
        image: options.image.clone(),
        kernel: options.kernel.clone(),
        vcpus,
        memory_mib: options.memory,
        disk_mib: options.disk,
        entrypoint: options.entrypoint.clone().map(|program| vec![program]),
        // As docker: another entry point does not get the image's arguments.
        command: some(&options.command).or(options.entrypoint.is_some().then(Vec::new)),
        env: options.env.iter().cloned().collect(),
        cwd: options.workdir.clone(),
        user: options.user.clone(),
        network: options.network.clone(),
        cmdline: options.cmdline.clone(),
        labels: options.label.iter().cloned().collect(),
        placement: options.place.placement(),
        restart: options.place.restart(),
        health: options.health.spec(),
    })
}

/// A refusal because of an unknown image or kernel says how to get one, when the node does not.
fn advise(error: ClientError, options: &Run) -> CliError {
    match error {
        ClientError::Refused(mut refusal) if refusal.error.suggestion.is_none() => {
            let about = |field: &str| {
                refusal.error.details.iter().any(|d| d.field.ends_with(field) && d.code == "not_found")
            };
            if about("kernel") {
                refusal.error.suggestion = Some("blixard kernel ls; blixard kernel import".into());
            } else if about("image") {
                let image = &options.image;
                refusal.error.suggestion =
                    Some(format!("blixard image ls; blixard image import FILE --name {image}"));
            }
            ClientError::Refused(refusal).into()
        }
        other => other.into(),
    }
}

async fn detached(context: &Context, options: &Run, created: &VmView) -> Result<u8, CliError> {
    let output = context.output;
    // First the id: whoever asked can find the VM even when the wait fails.
    match output.format {
        Format::Json | Format::Yaml => {}
        Format::Name => output.line(&created.name)?,
        Format::Table | Format::Wide => output.line(&created.id.to_string())?,
    }
    let id = created.id.to_string();
    let subject = Subject { client: &context.client, project: &context.project, name: &id };
    let mut view = created.clone();
    if options.wait == StartWait::Ready {
        let progress = Progress::start(output, &created.name);
        view = subject.wait_ready(options.timeout, &progress).await?;
        progress.finish(&format!("{} is {}", view.name, if ended(&view) { "finished" } else { "ready" }));
    }
    if output.structured() {
        output.value(&view)?;
    }
    Ok(0)
}

/// Shows the VM until it has ended; `None`: the user left before.
async fn foreground(
    context: &Context,
    options: &Run,
    subject: Subject<'_>,
) -> Result<Option<VmView>, CliError> {
    let console = options.interactive || options.tty;
    let shown = async {
        if !console {
            console::follow(subject).await?;
            return Ok(true);
        }
        let Some(stream) = console::open_early(subject, BEGIN_TIME).await? else { return Ok(true) };
        let raw = options.tty.then(RawMode::enter).transpose()?;
        let end = console::attach(stream, options.tty && std::io::stdin().is_terminal()).await;
        drop(raw);
        Ok::<bool, CliError>(end? == ConsoleEnd::Closed)
    };
    tokio::select! {
        shown = shown => {
            if !shown? {
                return Ok(None);
            }
        }
        () = interrupted(context, subject) => return Ok(None),
    }
    tokio::select! {
        view = subject.wait(&["stopped", "failed"], None) => view.map(Some),
        () = interrupted(context, subject) => Ok(None),
    }
}

/// The first Ctrl-C or SIGTERM stops the VM, the second one ends this.
async fn interrupted(context: &Context, subject: Subject<'_>) {
    let (Ok(mut interrupt), Ok(mut terminate)) =
        (signal(SignalKind::interrupt()), signal(SignalKind::terminate()))
    else {
        return std::future::pending().await;
    };
    let mut next = async || {
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
        }
    };
    next().await;
    let first = Instant::now();
    if std::io::stderr().is_terminal() && !context.output.quiet {
        context.output.note("\nStopping the VM; Ctrl-C again leaves it alone.");
    }
    if let Err(error) = subject.client.stop_vm(subject.project, subject.name, StopVm::default()).await {
        context.output.error(&error.into());
    }
    loop {
        next().await;
        if first.elapsed() > ONE_SIGNAL {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::args::{Cli, Command};

    fn parsed(words: &str) -> Run {
        let cli = Cli::try_parse_from(["blixard", "run"].into_iter().chain(words.split(' '))).unwrap();
        let Command::Run(run) = cli.command else { panic!("not run") };
        *run
    }

    #[test]
    fn options_before_the_image_are_ours_and_everything_after_it_is_the_command() {
        let options =
            parsed("-d --name web --cpus 2 -m 1G --disk 2G -e A=b -l k=v -w /srv -u 1:2 img sh -c -d --name");
        let spec = spec(&options).unwrap();
        assert_eq!((spec.vcpus, spec.memory_mib, spec.disk_mib), (2, 1024, 2048));
        assert_eq!(spec.command, Some(vec!["sh".into(), "-c".into(), "-d".into(), "--name".into()]));
        assert_eq!(spec.env.get("A").map(String::as_str), Some("b"));
        assert_eq!(spec.labels.get("k").map(String::as_str), Some("v"));
        assert_eq!((spec.cwd.as_deref(), spec.user.as_deref()), (Some("/srv"), Some("1:2")));
        assert_eq!((options.name.as_deref(), options.image.as_str()), (Some("web"), "img"));
    }

    #[test]
    fn without_a_command_the_image_decides_and_another_entry_point_gets_no_arguments_of_the_image() {
        let plain = spec(&parsed("img")).unwrap();
        assert_eq!((plain.entrypoint, plain.command), (None, None));
        let other = spec(&parsed("--entrypoint /bin/sh img")).unwrap();
        assert_eq!((other.entrypoint, other.command), (Some(vec!["/bin/sh".into()]), Some(vec![])));
    }

    #[test]
    fn a_health_check_is_a_shell_line_with_times_and_can_be_switched_off() {
        let health = |words: &str| spec(&parsed(words)).unwrap().health;
        assert_eq!(health("img"), None);
        let some = health("--health-cmd /check --health-interval 2s --health-retries 1 img").unwrap();
        assert_eq!(some.command, Some(["/bin/sh", "-c", "/check"].map(str::to_owned).into()));
        assert_eq!((some.interval_ms, some.retries, some.timeout_ms), (Some(2000), Some(1), None));
        assert_eq!(health("--no-healthcheck img").unwrap().command, Some(vec![]));
        let both = ["blixard", "run", "--no-healthcheck", "--health-cmd", "x", "img"];
        assert!(Cli::try_parse_from(both).is_err());
    }

    #[test]
    fn vcpus_that_have_no_form_in_the_api_are_refused_with_the_field_and_the_range() {
        let text = spec(&parsed("--vcpus 10000 img")).unwrap_err().to_text();
        assert!(text.contains("spec.vcpus: 1 to 32"), "{text}");
    }
}

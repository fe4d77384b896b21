//! `stop`, `start`, `rm`, `wait`: several VMs at once, each answer in the order they were named.

use std::future::Future;
use std::time::Duration;

use blixard_api::vm::{StopVm, VmView};
use futures::StreamExt;

use crate::Context;
use crate::args::{Moment, Remove, Start, StartWait, Stop, WaitFor};
use crate::error::{CliError, code};
use crate::follow::{Subject, ended, exit_code, failed};
use crate::progress::Progress;

/// Requests under way at once.
const AT_ONCE: usize = 16;

/// `stop`.
pub async fn stop(context: &Context, options: &Stop) -> Result<u8, CliError> {
    let grace = Duration::from_secs(options.time.into());
    let request = StopVm { grace_ms: u64::from(options.time) * 1000 };
    let patience = &options.patience;
    each(context, "stopping", &options.vms.vms, async |subject: Subject<'_>| {
        let mut view = subject.client.stop_vm(subject.project, subject.name, request).await?;
        if !patience.no_wait && !ended(&view) {
            view = subject.wait(&["stopped", "failed"], Some(patience.timeout + grace)).await?;
        }
        Ok(Some(view.name))
    })
    .await
}

/// `start`.
pub async fn start(context: &Context, options: &Start) -> Result<u8, CliError> {
    each(context, "starting", &options.vms.vms, async |subject: Subject<'_>| {
        let view = subject.client.start_vm(subject.project, subject.name).await?;
        if options.wait == StartWait::Ready {
            let silent = Progress::start(crate::Output { quiet: true, ..context.output }, "");
            subject.wait_ready(options.timeout, &silent).await?;
        }
        Ok(Some(view.name))
    })
    .await
}

/// `rm`.
pub async fn remove(context: &Context, options: &Remove) -> Result<u8, CliError> {
    each(context, "removing", &options.vms.vms, async |subject: Subject<'_>| {
        let view = match subject.client.delete_vm(subject.project, subject.name, options.force).await {
            Ok(view) => view,
            Err(error) => return Err(with_advice(error.into(), subject.name)),
        };
        if !options.patience.no_wait {
            // By its id: the name may already be somebody else's.
            let id = view.id.to_string();
            Subject { name: &id, ..subject }.wait_gone(options.patience.timeout).await?;
        }
        Ok(Some(view.name))
    })
    .await
}

/// A refusal to remove a running VM says how to do it.
fn with_advice(error: CliError, name: &str) -> CliError {
    use blixard_api::client::ClientError;
    match error {
        CliError::Client(ClientError::Refused(mut refusal)) if refusal.status == 409 => {
            refusal.error.suggestion =
                Some(format!("`blixard stop {name}` first, or `blixard rm -f {name}`"));
            CliError::Client(ClientError::Refused(refusal))
        }
        other => other,
    }
}

/// The error that a VM has ended before it was what is waited for.
fn never(view: &VmView, what: &str) -> CliError {
    let mut error = failed(view);
    if let (CliError::Vm { message, .. }, false) = (&mut error, view.phase == blixard_api::vm::Phase::Failed)
    {
        *message = format!("VM {:?} is stopped: it is not going to be {what}", view.name);
    }
    error
}

/// `wait`: prints exit codes when it waits for the end.
pub async fn wait(context: &Context, options: &WaitFor) -> Result<u8, CliError> {
    let time = options.timeout;
    each(context, "waiting", &options.vms.vms, async |subject: Subject<'_>| match options.until {
        Moment::Ready => {
            let view = subject.wait(&["ready", "stopped", "failed"], time).await?;
            if ended(&view) { Err(never(&view, "ready")) } else { Ok(None) }
        }
        Moment::Healthy => {
            let begin = std::time::Instant::now();
            let view = subject.wait(&["ready", "stopped", "failed"], time).await?;
            // A guest says that it looks before it says that it is ready.
            if !ended(&view) && view.health.is_none() {
                return Err(CliError::Vm {
                    message: format!("VM {:?} has no health check", view.name),
                    suggestion: "blixard run --health-cmd LINE".into(),
                    code: code::ERROR,
                });
            }
            let left = time.map(|time| time.saturating_sub(begin.elapsed()));
            let view = subject.wait(&["healthy", "stopped", "failed"], left).await?;
            if ended(&view) { Err(never(&view, "healthy")) } else { Ok(None) }
        }
        Moment::Stopped => {
            let view = subject.wait(&["stopped", "failed"], time).await?;
            match exit_code(&view) {
                Ok(code) => Ok(Some(code.to_string())),
                Err(CliError::Own(error)) => Err(*error),
                Err(error) => Err(error),
            }
        }
        Moment::Gone => {
            subject.wait_gone(time.unwrap_or(Duration::MAX)).await?;
            Ok(None)
        }
    })
    .await
}

/// Does something with each VM, prints its line or its error; the exit code is that of the first error.
async fn each<'a, W>(
    context: &'a Context,
    what: &str,
    names: &'a [String],
    work: impl Fn(Subject<'a>) -> W,
) -> Result<u8, CliError>
where
    W: Future<Output = Result<Option<String>, CliError>>,
{
    let label = match names {
        [one] => format!("{what} {one}"),
        many => format!("{what} {} VMs", many.len()),
    };
    let progress = Progress::start(context.output, &label);
    let subjects =
        names.iter().map(|name| Subject { client: &context.client, project: &context.project, name });
    let results: Vec<_> = futures::stream::iter(subjects.map(work)).buffered(AT_ONCE).collect().await;
    drop(progress);
    let mut first = 0;
    let mut lines = vec![];
    for result in results {
        match result {
            Ok(line) => lines.extend(line),
            Err(error) => {
                context.output.error(&error);
                first = if first == 0 { error.code().max(code::ERROR) } else { first };
            }
        }
    }
    if context.output.structured() {
        context.output.value(&lines)?;
    } else {
        for line in &lines {
            context.output.line(line)?;
        }
    }
    Ok(first)
}

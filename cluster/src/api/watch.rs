//! Changes as they happen, one JSON text per line.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::extract::{Request, State};
use axum::http::{HeaderName, header};
use axum::response::{IntoResponse, Response};
use blixard_api::REVISION_HEADER;
use blixard_api::watch::{Change as Told, Event};
use futures::stream;

use super::Shared;
use super::error::Failure;
use super::query::Parameters;
use super::view::view;
use crate::raft::replica::{Change, Changed, Compacted};
use crate::watch::Receiver;

/// Time after which a quiet connection gets a sign of life: below the 15 s that are promised.
const BEAT: Duration = Duration::from_secs(10);
/// Changes that are taken from the history at once.
const BATCH: usize = 256;

/// `GET /v1/watch`
pub async fn watch(State(api): State<Shared>, request: Request) -> Result<Response, Failure> {
    let parameters = Parameters::of(request.uri(), &["after"])?;
    let revisions = api.consensus.replica().revisions();
    let now = *revisions.borrow();
    let after = parameters.number("after", 0, u64::MAX)?.unwrap_or(now);
    let gone = |Compacted { forgotten }: Compacted| {
        Failure::compacted(format!(
            "changes after revision {after} are no longer all known, but those after {forgotten}"
        ))
        .suggest("list the VMs, then watch from the revision of that list")
    };
    api.consensus.replica().changes_after(after, 1).map_err(gone)?;
    if after > now {
        // A client that knows more than this node: after a restore from a backup, or of another cluster.
        return Err(Failure::compacted(format!("this node knows revision {now}, not {after}"))
            .suggest("list the VMs, then watch from the revision of that list"));
    }
    let watcher = Watcher { api: Arc::clone(&api), revisions, after, ready: VecDeque::new() };
    let lines = stream::unfold(watcher, |mut watcher| async move {
        let line = watcher.next().await?;
        Some((Ok::<Bytes, std::io::Error>(line), watcher))
    });
    let mut response = Body::from_stream(lines).into_response();
    response
        .headers_mut()
        .insert(header::CONTENT_TYPE, header::HeaderValue::from_static("application/x-ndjson"));
    response.headers_mut().insert(HeaderName::from_static(REVISION_HEADER), after.into());
    Ok(response)
}

struct Watcher {
    api: Shared,
    revisions: Receiver<u64>,
    after: u64,
    ready: VecDeque<Change>,
}

impl Watcher {
    /// The next line; `None` ends the answer: the node stops, or the client was too slow and must begin anew.
    async fn next(&mut self) -> Option<Bytes> {
        loop {
            if let Some(change) = self.ready.pop_front() {
                self.after = change.revision;
                return line(&self.event(change));
            }
            let known = *self.revisions.borrow_and_update();
            let changes = self.api.consensus.replica().changes_after(self.after, BATCH).ok()?;
            if !changes.is_empty() {
                self.ready.extend(changes);
                continue;
            }
            tokio::select! {
                () = self.api.stop.cancelled() => return None,
                changed = self.revisions.changed() => changed.ok()?,
                () = tokio::time::sleep(BEAT) => {
                    // All changes up to `known` have been sent, so the client may continue there.
                    self.after = known;
                    return line(&Event { revision: known, change: Told::Beat });
                }
            }
        }
    }

    fn event(&self, change: Change) -> Event {
        let told = match change.what {
            Changed::Vm(vm) => {
                let host = self.api.local.host();
                let state = self.api.consensus.replica().state();
                Told::Vm(Box::new(view(&self.api, &state, &host, &vm)))
            }
            Changed::VmGone(vm) => {
                Told::VmGone { project: vm.project.clone(), name: vm.name.clone(), id: vm.id }
            }
        };
        Event { revision: change.revision, change: told }
    }
}

fn line(event: &Event) -> Option<Bytes> {
    let mut text = serde_json::to_vec(event).ok()?;
    text.push(b'\n');
    Some(text.into())
}

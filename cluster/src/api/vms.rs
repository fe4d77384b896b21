//! VMs: create, list, read, start, stop, delete.

use std::sync::Arc;

use axum::body::Body;
use axum::extract::{Path, Request, State};
use axum::http::request::Parts;
use axum::http::{StatusCode, Uri};
use axum::response::{IntoResponse, Response};
use blixard_api::vm::{CreateVm, StopVm, VmView};
use blixard_api::{PAGE_ITEMS_MAX, Page, VmId, check_name};

use super::error::Failure;
use super::query::Parameters;
use super::view::view;
use super::{Api, Shared, answer, body, logs, mutate, streams, validate, wait};
use crate::state::apply::DEFAULT_KERNEL;
use crate::state::records::labels_match;
use crate::state::{Answer, Command, Key, Refusal, VmRecord};

/// Shortest prefix of an id that names a VM.
const PREFIX_MIN: usize = 4;
/// Longest grace time of a stop in milliseconds (a day).
const GRACE_MS_MAX: u64 = 24 * 60 * 60 * 1000;

/// `POST /v1/projects/{project}/vms`
pub async fn create(
    State(api): State<Shared>,
    Path(project): Path<String>,
    request: Request,
) -> Result<Response, Failure> {
    let (parts, content) = request.into_parts();
    let dry_run = Parameters::of(&parts.uri, &["dry_run"])?.flag("dry_run")?;
    let bytes = body::read(&parts.headers, content).await?;
    let request_us = api.consensus.clock().monotonic_us();
    let key = mutate::key(&parts, &bytes)?;
    if let Some((revision, kept)) = api.recall(key.as_ref())? {
        return api.vm_answer(revision, kept);
    }
    let wanted = match api.check(&project, body::parse(&bytes)?) {
        // An image may just have been named, or a larger node have joined, through another node.
        Err(failure)
            if failure.status == StatusCode::INSUFFICIENT_STORAGE
                || failure.body.details.iter().any(|detail| detail.code == "not_found") =>
        {
            api.catch_up().await?;
            // This request, asked before, may have been done when the image was still there.
            if let Some((revision, kept)) = api.recall(key.as_ref())? {
                return api.vm_answer(revision, kept);
            }
            api.check(&project, body::parse(&bytes)?)?
        }
        checked => checked?,
    };
    if dry_run {
        let revision = api.consensus.replica().state().revision();
        return Ok(answer(StatusCode::OK, revision, &api.explain(&project, &wanted.spec)));
    }
    if wanted.spec.kernel.as_deref().unwrap_or(DEFAULT_KERNEL) == DEFAULT_KERNEL {
        api.ensure_default_kernel().await?;
    }
    let name = wanted.name.unwrap_or_else(|| default_name(wanted.id));
    let (revision, done) = api.create_placed(key, wanted.id, project, name, wanted.spec).await?;
    if let Answer::Vm { vm, created: true } = &done {
        api.local.requested(vm.id, vm.start, request_us);
    }
    api.vm_answer(revision, done)
}

/// `vm-` and the last 8 characters of the id: its random end.
fn default_name(id: VmId) -> String {
    let text = id.to_string().to_ascii_lowercase();
    let end: String = text.chars().skip(text.len().saturating_sub(8)).collect();
    format!("vm-{end}")
}

/// `GET /v1/projects/{project}/vms`
pub async fn list(
    State(api): State<Shared>,
    Path(project): Path<String>,
    request: Request,
) -> Result<Response, Failure> {
    let parameters = Parameters::of(
        request.uri(),
        &["limit", "cursor", "label", "linearizable", "min_revision", "timeout_ms"],
    )?;
    api.at_least(&parameters).await?;
    let limit = limit(&parameters)?;
    let after = cursor(&parameters)?;
    let labels: Vec<(String, String)> = parameters
        .all("label")
        .map(|text| text.split_once('=').map(|(k, v)| (k.to_owned(), v.to_owned())))
        .collect::<Option<_>>()
        .ok_or_else(|| Failure::field("label", "bad_format", "key=value is needed"))?;
    let host = api.local.host();
    let state = api.consensus.replica().state();
    let matching = state.vms_of(&project, after).filter(|vm| labels_match(&vm.spec.labels, &labels));
    let views = matching.map(|vm| view(&api, &state, &host, vm));
    let page = page(views, limit, state.revision(), |vm: &VmView| &vm.name);
    Ok(answer(StatusCode::OK, page.revision, &page))
}

/// How many items a page may have.
///
/// # Errors
/// 422.
pub fn limit(parameters: &Parameters) -> Result<usize, Failure> {
    let most = u64::try_from(PAGE_ITEMS_MAX).unwrap_or(u64::MAX);
    let limit = parameters.number("limit", 1, most)?.unwrap_or(most);
    Ok(usize::try_from(limit).unwrap_or(PAGE_ITEMS_MAX))
}

/// The name after which a page begins.
///
/// # Errors
/// 422.
pub fn cursor(parameters: &Parameters) -> Result<Option<&str>, Failure> {
    let Some(text) = parameters.text("cursor")? else { return Ok(None) };
    let name = text.strip_prefix("after:").filter(|name| check_name(name, true).is_ok());
    let form = "only what the page before gave as cursor is possible";
    name.map(Some).ok_or_else(|| Failure::field("cursor", "bad_format", form))
}

/// The first `limit` items, and where the next page begins when there are more.
pub fn page<T>(
    items: impl Iterator<Item = T>,
    limit: usize,
    revision: u64,
    name: impl Fn(&T) -> &String,
) -> Page<T> {
    let mut items: Vec<T> = items.take(limit.saturating_add(1)).collect();
    let more = items.len() > limit;
    items.truncate(limit);
    let cursor = items.last().filter(|_| more).map(|item| format!("after:{}", name(item)));
    Page { items, cursor, revision }
}

/// `GET /v1/projects/{project}/vms/{name}` and `…/{name}:logs`
pub async fn get(
    State(api): State<Shared>,
    Path((project, name)): Path<(String, String)>,
    request: Request,
) -> Result<Response, Failure> {
    match name.split_once(':') {
        None => read(&api, &project, &name, request.uri()).await,
        Some((name, "logs")) => logs::logs(api, &project, name, request).await,
        Some((_, verb)) => Err(no_verb("GET", verb)),
    }
}

async fn read(api: &Api, project: &str, name: &str, uri: &Uri) -> Result<Response, Failure> {
    let parameters = Parameters::of(uri, &["wait", "linearizable", "timeout_ms", "min_revision"])?;
    let wanted = wait::wanted(&parameters)?;
    api.at_least(&parameters).await?;
    let id = api.find(project, name)?.id;
    if let Some((conditions, time)) = wanted {
        api.wait_for(id, &conditions, time).await?;
    }
    let host = api.local.host();
    let state = api.consensus.replica().state();
    let vm = state.vm(id).ok_or_else(|| no_vm(name))?;
    Ok(answer(StatusCode::OK, state.revision(), &view(api, &state, &host, vm)))
}

/// `POST /v1/projects/{project}/vms/{name}:{verb}`
pub async fn act(
    State(api): State<Shared>,
    Path((project, name)): Path<(String, String)>,
    request: Request,
) -> Result<Response, Failure> {
    let (name, verb) = name.split_once(':').ok_or_else(|| {
        Failure::method_not_allowed("a VM is made by POST to …/vms").suggest("did you mean …/vms/NAME:start?")
    })?;
    match verb {
        "start" => start(&api, &project, name, request).await,
        "stop" => stop(&api, &project, name, request).await,
        "exec" => streams::open(api, &project, name, request, streams::Kind::Exec).await,
        "console" => streams::open(api, &project, name, request, streams::Kind::Console).await,
        other => Err(no_verb("POST", other)),
    }
}

fn no_verb(method: &str, verb: &str) -> Failure {
    Failure::not_found(format!("a VM knows no {method} {verb:?}"))
        .suggest("POST :start :stop :exec :console, GET :logs")
}

async fn start(api: &Api, project: &str, name: &str, request: Request) -> Result<Response, Failure> {
    let (parts, content) = request.into_parts();
    let (key, kept) = begin(api, &parts, content, empty).await?;
    let request_us = api.consensus.clock().monotonic_us();
    if let Some((revision, kept)) = kept {
        return api.vm_answer(revision, kept);
    }
    let if_generation = mutate::if_match(&parts.headers)?;
    let mut start_before = None;
    let command = |vm: &VmRecord| {
        start_before = Some(vm.start);
        Command::StartVm { id: vm.id, if_generation }
    };
    let (revision, done) = api.change_vm(key, project, name, command).await?;
    if let Answer::Vm { vm, .. } = &done
        && start_before.is_some_and(|before| vm.start > before)
    {
        api.local.requested(vm.id, vm.start, request_us);
    }
    api.vm_answer(revision, done)
}

async fn stop(api: &Api, project: &str, name: &str, request: Request) -> Result<Response, Failure> {
    let (parts, content) = request.into_parts();
    let mut wanted = StopVm::default();
    let read = |bytes: &[u8]| {
        if !bytes.is_empty() {
            wanted = body::parse::<StopVm>(bytes)?.complete()?;
        }
        Ok(())
    };
    let (key, kept) = begin(api, &parts, content, read).await?;
    if let Some((revision, kept)) = kept {
        return api.vm_answer(revision, kept);
    }
    if wanted.grace_ms > GRACE_MS_MAX {
        let text = format!("0 to {GRACE_MS_MAX} milliseconds are possible");
        return Err(Failure::field("grace_ms", "out_of_range", text));
    }
    let if_generation = mutate::if_match(&parts.headers)?;
    let command = |vm: &VmRecord| Command::StopVm { id: vm.id, grace_ms: wanted.grace_ms, if_generation };
    let (revision, done) = api.change_vm(key, project, name, command).await?;
    api.vm_answer(revision, done)
}

fn empty(bytes: &[u8]) -> Result<(), Failure> {
    let nothing = bytes.is_empty() || matches!(bytes.trim_ascii(), b"{}");
    if nothing { Ok(()) } else { Err(Failure::malformed("this request has no body")) }
}

/// The beginning of a mutation without query: its body, its key, and the kept answer if it is a repetition.
async fn begin(
    api: &Api,
    parts: &Parts,
    content: Body,
    read: impl FnOnce(&[u8]) -> Result<(), Failure>,
) -> Result<(Option<Key>, Option<(u64, Answer)>), Failure> {
    Parameters::of(&parts.uri, &[])?;
    let bytes = body::read(&parts.headers, content).await?;
    read(&bytes)?;
    let key = mutate::key(parts, &bytes)?;
    let kept = api.recall(key.as_ref())?;
    Ok((key, kept))
}

/// `DELETE /v1/projects/{project}/vms/{name}`
pub async fn delete(
    State(api): State<Shared>,
    Path((project, name)): Path<(String, String)>,
    request: Request,
) -> Result<Response, Failure> {
    let (parts, _) = request.into_parts();
    let force = Parameters::of(&parts.uri, &["force"])?.flag("force")?;
    let key = mutate::key(&parts, &[])?;
    let (revision, done) = match api.recall(key.as_ref())? {
        Some(kept) => kept,
        None => {
            let if_generation = mutate::if_match(&parts.headers)?;
            let command = |vm: &VmRecord| Command::DeleteVm { id: vm.id, force, if_generation };
            api.change_vm(key, &project, &name, command).await?
        }
    };
    let mut response = api.vm_answer(revision, done)?;
    *response.status_mut() = StatusCode::ACCEPTED;
    Ok(response)
}

fn no_vm(name: &str) -> Failure {
    Failure::not_found(format!("there is no VM {name:?}")).suggest("blixard ps --all lists the VMs")
}

impl Api {
    /// The VM with this name, id, or prefix of an id.
    ///
    /// # Errors
    /// 404, or 409 when the prefix names several.
    pub fn find(&self, project: &str, name: &str) -> Result<Arc<VmRecord>, Failure> {
        let state = self.consensus.replica().state();
        if let Some(vm) = state.vm_named(project, name) {
            return Ok(Arc::clone(vm));
        }
        let wanted = name.to_ascii_uppercase();
        if wanted.len() < PREFIX_MIN {
            return Err(no_vm(name));
        }
        let mut matching = state.vms_of(project, None).filter(|vm| vm.id.to_string().starts_with(&wanted));
        match (matching.next(), matching.next()) {
            (Some(vm), None) => Ok(Arc::clone(vm)),
            (Some(a), Some(b)) => {
                let text = format!(
                    "{name:?} is the beginning of several ids, among them those of {:?} and {:?}",
                    a.name, b.name
                );
                Err(Failure::conflict(text).suggest("give more characters, or the name"))
            }
            (None, _) => Err(no_vm(name)),
        }
    }

    /// The same, but what this node does not know it asks the leader for: a VM that was just made through another node is found.
    ///
    /// # Errors
    /// 404 when there is none, 409 when the prefix names several, 503 when no leader says so.
    pub async fn find_newest(&self, project: &str, name: &str) -> Result<Arc<VmRecord>, Failure> {
        match self.find(project, name) {
            Err(failure) if failure.status == StatusCode::NOT_FOUND => {
                self.catch_up().await?;
                self.find(project, name)
            }
            found => found,
        }
    }

    /// Proposes a change of the VM with this name. Whether it is there is what the whole cluster knows, not only this node.
    ///
    /// # Errors
    /// As [`Self::find_newest`] and [`Self::propose`].
    async fn change_vm(
        &self,
        key: Option<Key>,
        project: &str,
        name: &str,
        mut command: impl FnMut(&VmRecord) -> Command,
    ) -> Result<(u64, Answer), Failure> {
        let mut caught_up = false;
        loop {
            match self.find(project, name) {
                Ok(vm) => match self.propose_raw(key.clone(), command(&vm)).await? {
                    // This node has applied that, so it knows by now which VM has the name.
                    (_, Err(Refusal::NoVm)) if !caught_up => {}
                    (revision, outcome) => return Ok((revision, outcome?)),
                },
                Err(failure) if failure.status == StatusCode::NOT_FOUND && !caught_up => {
                    self.catch_up().await?;
                    // What took the name away may have been this request, asked before.
                    if let Some(kept) = self.recall(key.as_ref())? {
                        return Ok(kept);
                    }
                }
                Err(failure) => return Err(failure),
            }
            caught_up = true;
        }
    }

    fn vm_answer(&self, revision: u64, done: Answer) -> Result<Response, Failure> {
        let Answer::Vm { vm, created } = done else {
            return Err(Failure::internal("the state answered with something else than a VM"));
        };
        let status = if created { StatusCode::CREATED } else { StatusCode::OK };
        let host = self.local.host();
        let seen = view(self, &self.consensus.replica().state(), &host, &vm);
        Ok(answer(status, revision, &seen).into_response())
    }

    /// Checks everything about a new VM that can be checked here.
    fn check(&self, project: &str, parsed: body::Parsed<CreateVm>) -> Result<CreateVm, Failure> {
        let body::Parsed { value, mut details } = parsed;
        let Some(wanted) = value else { return Err(Failure::invalid(details)) };
        let known: Vec<String> = details.iter().map(|d| d.field.clone()).collect();
        validate::names(project, wanted.name.as_deref(), &mut details);
        validate::spec(&self.consensus.replica().state(), &wanted.spec, &known, &mut details);
        if !details.is_empty() {
            let no_image = details.iter().any(|d| d.field == "spec.image");
            let failure = Failure::invalid(details);
            return Err(if no_image {
                failure.suggest(
                    "blixard image ls lists the images, blixard image import FILE --name NAME adds one",
                )
            } else {
                failure
            });
        }
        if let Some(has) = self.most_memory().filter(|has| u64::from(wanted.spec.memory_mib) > *has) {
            let asked = wanted.spec.memory_mib;
            let text = format!("{asked} MiB of memory asked for, no node has more than {has} MiB");
            return Err(Failure::no_capacity(text).suggest("ask for less memory"));
        }
        Ok(wanted)
    }

    /// The most memory in MiB that a node has; `None` while one has not told.
    fn most_memory(&self) -> Option<u64> {
        // What this node's own agent said may be newer than what was agreed.
        let here = self.local.host().seen.map(|seen| seen.report.capacity.memory_mib).filter(|mib| *mib > 0);
        let state = self.consensus.replica().state();
        let of = |node: &Arc<crate::state::NodeRecord>| {
            let own = here.filter(|_| node.id == self.consensus.node());
            own.or(node.offer.capacity.map(|capacity| capacity.memory_mib))
        };
        state.nodes().map(of).collect::<Option<Vec<u64>>>()?.into_iter().max()
    }
}

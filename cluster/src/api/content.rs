//! Images and kernels: upload, list, read, delete.

use std::sync::Arc;

use axum::body::Body;
use axum::extract::{Path, Request, State};
use axum::http::request::Parts;
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::Response;
use blixard_api::image::{ImageView, KernelView};
use blixard_api::{UPLOAD_BYTES_MAX, check_name};

use super::error::Failure;
use super::query::Parameters;
use super::vms::{cursor, limit, page};
use super::{Api, Shared, answer, mutate};
use crate::host::chain;
use crate::images::upload::upload;
use crate::images::{ImportFailure, Importer};
use crate::state::apply::DEFAULT_KERNEL;
use crate::state::{Answer, Command, ImageRecord, KernelRecord};

fn image_view(image: &ImageRecord) -> ImageView {
    ImageView {
        name: image.name.clone(),
        digest: image.blob.digest.to_string(),
        size_bytes: image.blob.size_bytes,
        fs: image.fs.clone(),
        created_at_ms: image.created_at_ms,
        config: image.config.clone(),
    }
}

fn kernel_view(kernel: &KernelRecord) -> KernelView {
    KernelView {
        name: kernel.name.clone(),
        release: kernel.release.clone(),
        digest: kernel.kernel.digest.to_string(),
        initramfs_digest: kernel.initramfs.digest.to_string(),
        size_bytes: kernel.kernel.size_bytes.saturating_add(kernel.initramfs.size_bytes),
        modules: kernel.modules.clone(),
        created_at_ms: kernel.created_at_ms,
    }
}

fn content_answer(status: StatusCode, revision: u64, done: Answer) -> Result<Response, Failure> {
    match done {
        Answer::Image(image) => Ok(answer(status, revision, &image_view(&image))),
        Answer::Kernel(kernel) => Ok(answer(status, revision, &kernel_view(&kernel))),
        _ => Err(Failure::internal("the state answered with something else than content")),
    }
}

/// `GET /v1/images`
pub async fn list_images(State(api): State<Shared>, request: Request) -> Result<Response, Failure> {
    let parameters =
        Parameters::of(request.uri(), &["limit", "cursor", "linearizable", "min_revision", "timeout_ms"])?;
    api.at_least(&parameters).await?;
    let (limit, after) = (limit(&parameters)?, cursor(&parameters)?);
    let state = api.consensus.replica().state();
    let views = state.images().filter(|i| after.is_none_or(|a| i.name.as_str() > a)).map(|i| image_view(i));
    let page = page(views, limit, state.revision(), |image: &ImageView| &image.name);
    Ok(answer(StatusCode::OK, page.revision, &page))
}

/// `GET /v1/kernels`
pub async fn list_kernels(State(api): State<Shared>, request: Request) -> Result<Response, Failure> {
    let parameters =
        Parameters::of(request.uri(), &["limit", "cursor", "linearizable", "min_revision", "timeout_ms"])?;
    api.at_least(&parameters).await?;
    let (limit, after) = (limit(&parameters)?, cursor(&parameters)?);
    let state = api.consensus.replica().state();
    let views = state.kernels().filter(|k| after.is_none_or(|a| k.name.as_str() > a)).map(|k| kernel_view(k));
    let page = page(views, limit, state.revision(), |kernel: &KernelView| &kernel.name);
    Ok(answer(StatusCode::OK, page.revision, &page))
}

fn no_image(name: &str) -> Failure {
    crate::state::Refusal::NoImage(name.to_owned()).into()
}

fn no_kernel(name: &str) -> Failure {
    crate::state::Refusal::NoKernel(name.to_owned()).into()
}

/// `GET /v1/images/{name}`
pub async fn get_image(
    State(api): State<Shared>,
    Path(name): Path<String>,
    request: Request,
) -> Result<Response, Failure> {
    api.at_least(&Parameters::of(request.uri(), &["linearizable", "min_revision", "timeout_ms"])?).await?;
    let state = api.consensus.replica().state();
    let image = state.image(&name).ok_or_else(|| no_image(&name))?;
    Ok(answer(StatusCode::OK, state.revision(), &image_view(image)))
}

/// `GET /v1/kernels/{name}`
pub async fn get_kernel(
    State(api): State<Shared>,
    Path(name): Path<String>,
    request: Request,
) -> Result<Response, Failure> {
    api.at_least(&Parameters::of(request.uri(), &["linearizable", "min_revision", "timeout_ms"])?).await?;
    let state = api.consensus.replica().state();
    let kernel = state.kernel(&name).ok_or_else(|| no_kernel(&name))?;
    Ok(answer(StatusCode::OK, state.revision(), &kernel_view(kernel)))
}

/// `DELETE /v1/images/{name}`
pub async fn delete_image(
    State(api): State<Shared>,
    Path(name): Path<String>,
    request: Request,
) -> Result<Response, Failure> {
    delete(api, request, Command::DeleteImage { name }).await
}

/// `DELETE /v1/kernels/{name}`
pub async fn delete_kernel(
    State(api): State<Shared>,
    Path(name): Path<String>,
    request: Request,
) -> Result<Response, Failure> {
    delete(api, request, Command::DeleteKernel { name }).await
}

async fn delete(api: Shared, request: Request, command: Command) -> Result<Response, Failure> {
    let (parts, _) = request.into_parts();
    Parameters::of(&parts.uri, &[])?;
    let key = mutate::key(&parts, &[])?;
    let (revision, done) = match api.recall(key.as_ref())? {
        Some(kept) => kept,
        None => api.propose(key, command).await?,
    };
    tokio::spawn(Api::sweep(Arc::clone(&api)));
    content_answer(StatusCode::OK, revision, done)
}

/// The name and the announced length of an upload.
fn head(api: &Api, parts: &Parts, image: bool) -> Result<String, Failure> {
    let parameters = Parameters::of(&parts.uri, &["name"])?;
    let name = parameters.text("name")?.ok_or_else(|| Failure::field("name", "required", "is needed"))?;
    check_name(name, image).map_err(|form| Failure::field("name", "bad_format", form))?;
    let length = announced(&parts.headers);
    if length > UPLOAD_BYTES_MAX {
        return Err(Failure::too_large(format!(
            "at most {UPLOAD_BYTES_MAX} bytes can be uploaded, {length} were announced"
        )));
    }
    api.importer.check_space(length).map_err(refused)?;
    Ok(name.to_owned())
}

fn announced(headers: &HeaderMap) -> u64 {
    headers.get(header::CONTENT_LENGTH).and_then(|v| v.to_str().ok()?.parse().ok()).unwrap_or(0)
}

fn refused(failure: ImportFailure) -> Failure {
    let text = chain(&failure);
    if failure.is_full_disk() {
        Failure::no_capacity(text).suggest("remove images that are no longer needed: blixard image rm NAME")
    } else if failure.is_timeout() {
        Failure::timeout(text)
    } else if failure.is_ours() {
        Failure::internal(text)
    } else {
        failure.suggestion().into_iter().fold(Failure::field("body", "bad_format", text), Failure::suggest)
    }
}

/// Imports the body on a thread of its own while it arrives.
async fn import<T: Send + 'static>(
    api: &Api,
    body: Body,
    read: impl FnOnce(&Importer, &mut dyn std::io::Read) -> Result<T, ImportFailure> + Send + 'static,
) -> Result<T, Failure> {
    let (mut source, moved) = upload(body);
    let importer = api.importer.clone();
    let made = tokio::task::spawn_blocking(move || read(&importer, &mut source));
    let (made, ()) = tokio::join!(made, moved);
    made.map_err(|error| Failure::internal(format!("the import did not end: {error}")))?.map_err(refused)
}

/// `POST /v1/images?name=N`
pub async fn upload_image(State(api): State<Shared>, request: Request) -> Result<Response, Failure> {
    let (parts, body) = request.into_parts();
    let name = head(&api, &parts, true)?;
    let key = mutate::key(&parts, &[])?;
    if let Some((revision, kept)) = api.recall(key.as_ref())? {
        return content_answer(StatusCode::CREATED, revision, kept);
    }
    let _unnamed = api.importer.importing().await;
    let mut image = import(&api, body, move |importer, source| importer.image(name, source)).await?;
    tracing::info!(name = image.name, digest = %image.blob.digest, bytes = image.blob.size_bytes, "image imported");
    if image.config.health.is_some() && !api.consensus.replica().state().checks_health() {
        tracing::warn!(
            name = image.name,
            "its health check is left out: the cluster's feature level is too low"
        );
        image.config.health = None;
    }
    let (revision, done) = api.propose(key, Command::PutImage(Box::new(image))).await?;
    tokio::spawn(Api::sweep(Arc::clone(&api)));
    content_answer(StatusCode::CREATED, revision, done)
}

/// `POST /v1/kernels?name=N`
pub async fn upload_kernel(State(api): State<Shared>, request: Request) -> Result<Response, Failure> {
    let (parts, body) = request.into_parts();
    let name = head(&api, &parts, false)?;
    let key = mutate::key(&parts, &[])?;
    if let Some((revision, kept)) = api.recall(key.as_ref())? {
        return content_answer(StatusCode::CREATED, revision, kept);
    }
    let _unnamed = api.importer.importing().await;
    let kernel = import(&api, body, move |importer, source| importer.kernel(name, source)).await?;
    tracing::info!(name = kernel.name, release = kernel.release, "kernel imported");
    let (revision, done) = api.propose(key, Command::PutKernel(Box::new(kernel))).await?;
    tokio::spawn(Api::sweep(Arc::clone(&api)));
    content_answer(StatusCode::CREATED, revision, done)
}

impl Api {
    /// Imports the host's own kernel when VMs need a default one and there is none.
    ///
    /// # Errors
    /// 404 with the reason why the host's kernel is of no use.
    pub async fn ensure_default_kernel(&self) -> Result<(), Failure> {
        let known = || self.consensus.replica().state().kernel(DEFAULT_KERNEL).is_some();
        if known() {
            return Ok(());
        }
        let _one = self.default_kernel.lock().await;
        // It may be there, and this node not know it yet.
        self.catch_up().await?;
        if known() {
            return Ok(());
        }
        let _unnamed = self.importer.importing().await;
        let importer = self.importer.clone();
        let made = tokio::task::spawn_blocking(move || importer.host_kernel(DEFAULT_KERNEL.into())).await;
        let made = made.map_err(|error| Failure::internal(format!("the import did not end: {error}")))?;
        let kernel = made.map_err(|failure| {
            let text = chain(&failure);
            Failure::not_found(format!("there is no kernel {DEFAULT_KERNEL:?} yet, and {text}"))
                .suggest(failure.suggestion().unwrap_or_else(|| "sudo blixard kernel import".into()))
        })?;
        tracing::info!(release = kernel.release, "the host's own kernel is the default kernel");
        self.propose(None, Command::PutKernel(Box::new(kernel))).await?;
        Ok(())
    }

    /// Removes content that no record needs any more.
    pub async fn sweep(api: Shared) {
        let consensus = api.consensus.clone();
        api.importer.sweep(move |digest| consensus.replica().state().needs(digest)).await;
    }
}

//! One bucket of an S3-compatible store, as the cargo feature `s3` brings it.

use anyhow::Context as _;
use bytes::Bytes;
use object_store::aws::{AmazonS3, AmazonS3Builder};
use object_store::client::{ClientOptions, HttpClient, HttpConnector};
use object_store::path::Path;
use object_store::{GetResult, ObjectStoreExt, RetryConfig};

use super::BlobId;
use crate::config::S3;
use crate::http_client::{self, Redirects};

pub struct Bucket {
    store: AmazonS3,
    prefix: String,
}

/// A file that the bucket has begun to send.
pub struct Object(GetResult);

impl Object {
    /// In bytes.
    pub fn size(&self) -> u64 {
        self.0.meta.size
    }

    pub async fn content(self) -> anyhow::Result<Bytes> {
        Ok(self.0.bytes().await?)
    }
}

impl Bucket {
    pub fn new(s3: &S3) -> anyhow::Result<Self> {
        let text = |secret: &crate::config::secret::Secret| {
            String::from_utf8(secret.expose().to_vec()).context("expected ASCII in the keys")
        };
        let mut builder = AmazonS3Builder::new()
            .with_bucket_name(&s3.bucket)
            .with_region(&s3.region)
            .with_access_key_id(text(&s3.access_key)?)
            .with_secret_access_key(text(&s3.secret_key)?)
            // Builds do not wait for it.
            .with_retry(RetryConfig {
                max_retries: 1,
                ..RetryConfig::default()
            })
            .with_http_connector(OurClient);
        if let Some(endpoint) = &s3.endpoint {
            builder = builder
                .with_endpoint(endpoint.as_str().trim_end_matches('/'))
                .with_allow_http(endpoint.scheme() == "http");
        }
        Ok(Self {
            store: builder.build()?,
            prefix: s3.prefix.clone(),
        })
    }

    /// The file, if there is one.
    pub async fn get(&self, id: &BlobId) -> anyhow::Result<Option<Object>> {
        match self.store.get(&self.path(id)).await {
            Ok(found) => Ok(Some(Object(found))),
            Err(object_store::Error::NotFound { .. }) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    pub async fn has(&self, id: &BlobId) -> anyhow::Result<bool> {
        match self.store.head(&self.path(id)).await {
            Ok(_) => Ok(true),
            Err(object_store::Error::NotFound { .. }) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    pub async fn put(&self, id: &BlobId, content: Vec<u8>) -> anyhow::Result<()> {
        self.store.put(&self.path(id), content.into()).await?;
        Ok(())
    }

    fn path(&self, id: &BlobId) -> Path {
        let name = id.digest.to_string();
        let prefix = self.prefix.split('/').filter(|part| !part.is_empty());
        let parts = prefix.chain([&*id.space, &name[..2], &name]);
        Path::from_iter(parts)
    }
}

/// The HTTP client that everything else uses as well.
#[derive(Debug)]
struct OurClient;

impl HttpConnector for OurClient {
    fn connect(&self, _: &ClientOptions) -> object_store::Result<HttpClient> {
        let client = http_client::client(Redirects::SameOrigin);
        let client = client.map_err(|error| object_store::Error::Generic {
            store: "S3",
            source: error.into(),
        })?;
        Ok(HttpClient::new(client))
    }
}

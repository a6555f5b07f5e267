//! The section `storage`.

use super::{Validator, optional};
use crate::config::file::{S3File, StorageFile};
use crate::config::given::{AbsolutePath, Given, Written, is_word};
use crate::config::problem::quote;
use crate::config::{S3, Storage};

impl Validator<'_> {
    pub(super) fn storage(&mut self, file: &StorageFile) -> Option<Storage> {
        let max_size = self.size("storage.max_size", &file.max_size);
        let s3 = optional(&file.s3, |file| self.s3(file));
        Some(Storage {
            max_size: max_size?,
            s3: s3?,
        })
    }

    fn s3(&mut self, file: &S3File) -> Option<S3> {
        if cfg!(not(feature = "s3")) {
            let found = "a bucket, which this build knows nothing of";
            return self.wrong(
                "storage.s3",
                found,
                "none, or a build with the cargo feature `s3`",
            );
        }
        let bucket = self.required("storage.s3.bucket", file.bucket.as_ref());
        let bucket = bucket.and_then(|name| self.s3_word("storage.s3.bucket", name, false));
        let endpoint = optional(&file.endpoint, |given| {
            self.read("storage.s3.endpoint", given)
        });
        let region = self.read("storage.s3.region", &file.region);
        let region = region.and_then(|name| self.s3_word("storage.s3.region", name, false));
        let prefix = self.read("storage.s3.prefix", &file.prefix);
        let prefix = prefix.and_then(|name| self.s3_word("storage.s3.prefix", name, true));
        let access = self.s3_key("storage.s3.access_key_file", file.access_key_file.as_ref());
        let secret = self.s3_key("storage.s3.secret_key_file", file.secret_key_file.as_ref());
        let (access_key_file, access_key) = access?;
        let (secret_key_file, secret_key) = secret?;
        Some(S3 {
            bucket: bucket?,
            endpoint: endpoint?.map(|url| url.0),
            region: region?,
            prefix: prefix?,
            access_key_file,
            access_key,
            secret_key_file,
            secret_key,
        })
    }

    fn s3_key(
        &mut self,
        key: &str,
        given: Option<&Given<AbsolutePath>>,
    ) -> Option<(std::path::PathBuf, crate::config::secret::Secret)> {
        match given {
            Some(given) => self.secret(key, given),
            None => self.missing(key, &AbsolutePath::expected()),
        }
    }

    fn s3_word(&mut self, key: &str, word: String, is_path: bool) -> Option<String> {
        let is_right = match is_path {
            true => word.split('/').all(is_word),
            false => is_word(&word) && !word.is_empty(),
        };
        if !is_right || word.contains("..") {
            return self.wrong(key, quote(&word), "letters, digits, `.`, `-` and `_`");
        }
        Some(word)
    }
}

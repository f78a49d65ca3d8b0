{{- define "cwpo.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 50 | trimSuffix "-" -}}
{{- else -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- if contains $name .Release.Name -}}
{{- .Release.Name | trunc 50 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name $name | trunc 50 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* What selects the pods of a part: (list . "service"). */}}
{{- define "cwpo.selector" -}}
{{- $root := index . 0 -}}
app.kubernetes.io/name: {{ default $root.Chart.Name $root.Values.nameOverride }}
app.kubernetes.io/instance: {{ $root.Release.Name }}
app.kubernetes.io/component: {{ index . 1 }}
{{- end -}}

{{/* The labels of an object of a part: (list . "service"). */}}
{{- define "cwpo.labels" -}}
{{- $root := index . 0 -}}
{{ include "cwpo.selector" . }}
app.kubernetes.io/version: {{ $root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ $root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" $root.Chart.Name $root.Chart.Version }}
{{- with $root.Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* repository:tag or repository@digest: (list . .Values.service.image). */}}
{{- define "cwpo.image" -}}
{{- $root := index . 0 -}}
{{- $image := index . 1 -}}
{{- if $image.digest -}}
{{ $image.repository }}@{{ $image.digest }}
{{- else -}}
{{ $image.repository }}:{{ default $root.Chart.AppVersion $image.tag }}
{{- end -}}
{{- end -}}

{{- define "cwpo.serviceAccountName" -}}
{{- if .Values.serviceAccount.create -}}
{{ default (include "cwpo.fullname" .) .Values.serviceAccount.name }}
{{- else -}}
{{ default "default" .Values.serviceAccount.name }}
{{- end -}}
{{- end -}}

{{- define "cwpo.authSecret" -}}
{{ default (printf "%s-auth" (include "cwpo.fullname" .)) .Values.auth.existingSecret }}
{{- end -}}

{{/* The Secret that External Secrets makes of an entry: (list . "redis"). */}}
{{- define "cwpo.externalSecret" -}}
{{ include "cwpo.fullname" (index . 0) }}-external-{{ kebabcase (index . 1) }}
{{- end -}}

{{/* The Secret with the variables of the store's driver; nothing without one. */}}
{{- define "cwpo.storeSecret" -}}
{{- if .Values.externalSecrets.objectStore -}}
{{ include "cwpo.externalSecret" (list . "objectStore") }}
{{- else -}}
{{ .Values.store.credentialsSecret }}
{{- end -}}
{{- end -}}

{{/* The workloads that host an annotator, as a list: the service, and with one the former annotator. */}}
{{- define "cwpo.hosts" -}}
{{- $annotator := omit .Values.annotator "former" -}}
{{- $former := .Values.annotator.former -}}
- {suffix: "", part: service, annotator: {{ toJson $annotator }}}
{{- if or $former.model $former.fetch.from }}
- {suffix: -former, part: former, annotator: {{ toJson (merge (pick $former "model" "fetch") (omit $annotator "model" "fetch")) }}}
{{- end }}
{{- end -}}

{{/* What a service of this annotator is told to host. */}}
{{- define "cwpo.annotator" -}}
{{ ternary "/models/annotator" .model (not (empty .fetch.from)) }}
{{- end -}}

{{/* What the service and the workers know of the store by their environment. */}}
{{- define "cwpo.storeSecretEnv" -}}
{{- with include "cwpo.storeSecret" . -}}
envFrom:
  - secretRef:
      name: {{ . }}
{{- end -}}
{{- end -}}

{{- define "cwpo.redisSecret" -}}
{{- if eq .Values.redis.mode "embedded" -}}
{{ include "cwpo.fullname" . }}-redis
{{- else if .Values.externalSecrets.redis -}}
{{ include "cwpo.externalSecret" (list . "redis") }}
{{- else -}}
{{ required "redis.mode is external: set redis.existingSecret to a Secret with the key url" .Values.redis.existingSecret }}
{{- end -}}
{{- end -}}

{{- define "cwpo.redisAddress" -}}
{{ include "cwpo.fullname" . }}-redis.{{ .Release.Namespace }}.svc:6379
{{- end -}}

{{- define "cwpo.storeClaim" -}}
{{ default (printf "%s-store" (include "cwpo.fullname" .)) .Values.store.persistence.existingClaim }}
{{- end -}}

{{/* Environment that the service and the workers share. */}}
{{- define "cwpo.sharedEnv" -}}
- name: CWPO_REDIS_URL
  valueFrom:
    secretKeyRef:
      name: {{ include "cwpo.redisSecret" . }}
      key: url
- name: CWPO_STORE_URL
  value: {{ default "/data/store" .Values.store.url | quote }}
{{- with .Values.store.endpoint }}
- name: AWS_ENDPOINT_URL
  value: {{ . | quote }}
{{- end }}
{{- end -}}

{{/* Whether the store can be mounted on one node only: "true" or nothing. */}}
{{- define "cwpo.onOneNode" -}}
{{- if and (not .Values.store.url) (eq .Values.store.persistence.accessMode "ReadWriteOnce") -}}
true
{{- end -}}
{{- end -}}

{{/* Spreads the pods of a part over zones and nodes, where there are several: (list . "service"). */}}
{{- define "cwpo.topologySpread" -}}
{{- $selector := include "cwpo.selector" . -}}
{{- range list "topology.kubernetes.io/zone" "kubernetes.io/hostname" }}
- topologyKey: {{ . }}
  maxSkew: 1
  whenUnsatisfiable: ScheduleAnyway
  # Without the pods of an earlier revision, which an upgrade removes.
  matchLabelKeys: [pod-template-hash]
  labelSelector:
    matchLabels: {{- $selector | nindent 6 }}
{{- end }}
{{- end -}}

{{/* The port of a URL. */}}
{{- define "cwpo.port" -}}
{{- $url := urlParse . -}}
{{- $port := regexFind ":[0-9]+$" $url.host | trimPrefix ":" -}}
{{ default (ternary "80" "443" (eq $url.scheme "http")) $port }}
{{- end -}}

{{/* NetworkPolicy peers: all pods of these namespaces. */}}
{{- define "cwpo.namespaces" -}}
- namespaceSelector:
    matchExpressions:
      - {key: kubernetes.io/metadata.name, operator: In, values: {{ toJson . }}}
{{- end -}}

{{- define "cwpo.dnsEgress" -}}
- ports: [{port: 53, protocol: UDP}, {port: 53, protocol: TCP}]
  to: {{- toYaml .Values.networkPolicy.dns | nindent 4 }}
{{- end -}}

{{/* What the service and the workers connect to: names, the queue, the store. */}}
{{- define "cwpo.sharedEgress" -}}
{{ include "cwpo.dnsEgress" . }}
{{- if eq .Values.redis.mode "embedded" }}
- ports: [{port: 6379}]
  to:
    - podSelector:
        matchLabels: {{- include "cwpo.selector" (list . "redis") | nindent 10 }}
{{- else }}
- ports: [{port: {{ .Values.networkPolicy.redisPort }}}]
{{- end }}
{{- if or .Values.store.url .Values.store.inputPrefix }}
# The object store, by HTTPS.
- ports: [{port: {{ include "cwpo.port" (default "https://store" .Values.store.endpoint) }}}]
{{- end }}
{{- with .Values.networkPolicy.allowTo }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "cwpo.podSecurityContext" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
fsGroupChangePolicy: OnRootMismatch
seccompProfile:
  type: RuntimeDefault
{{- end -}}

{{- define "cwpo.containerSecurityContext" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end -}}

{{/* Resources with the service's GPUs: (list . .Values.service.resources). */}}
{{- define "cwpo.withGpu" -}}
{{- $gpu := (index . 0).Values.service.gpu -}}
{{- $resources := deepCopy (index . 1) -}}
{{- if $gpu.count -}}
{{- $resources = mustMergeOverwrite $resources (dict "limits" (dict $gpu.resource $gpu.count)) -}}
{{- end -}}
{{ toYaml $resources }}
{{- end -}}

{{/* Whether vLLM answers, asked within its container. */}}
{{- define "cwpo.vllmProbe" -}}
[python3, -c, "import urllib.request as u; u.urlopen('http://127.0.0.1:8002/health', timeout=4)"]
{{- end -}}

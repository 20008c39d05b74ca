{{/* What pod security `restricted` asks for, and a bit more: the root file system is read-only. */}}
{{- define "motet.podSecurityContext" -}}
runAsNonRoot: true
runAsUser: 65532
runAsGroup: 65532
fsGroup: 65532
seccompProfile:
  type: RuntimeDefault
{{- end -}}

{{- define "motet.containerSecurityContext" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end -}}

{{/* Where and how pods of a component run: (list . "gateway"). */}}
{{- define "motet.scheduling" -}}
{{- $root := index . 0 -}}
{{- $component := index . 1 -}}
{{- with index $root.Values $component -}}
{{- with .priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with .nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .topologySpreadConstraints }}
topologySpreadConstraints:
  {{- range . }}
  - {{ toYaml . | nindent 4 | trim }}
    labelSelector:
      matchLabels:
        {{- include "motet.selectorLabels" (list $root $component) | nindent 8 }}
    # Pods of an old version do not count, or a rollout would end lopsided.
    matchLabelKeys: [pod-template-hash]
  {{- end }}
{{- end }}
{{- end }}
{{- end -}}

{{/* Annotations and labels of the pods of a component: (list . "gateway"). */}}
{{- define "motet.podMetadata" -}}
{{- $root := index . 0 -}}
{{- $component := index . 1 -}}
{{- with index $root.Values $component -}}
labels:
  {{- include "motet.labels" (list $root $component) | nindent 2 }}
  {{- with .podLabels }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- with .podAnnotations }}
annotations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}
{{- end -}}

{{/*
`settings` and `extraEnv` of a component as environment variables. A number of a values file is a float here, and a large
one would be printed with an exponent.
*/}}
{{- define "motet.env" -}}
{{- range $name, $value := .settings }}
- name: MOTET_{{ $name | snakecase | upper }}
  value: {{ ternary (int64 $value) $value (kindIs "float64" $value) | toString | quote }}
{{- end }}
{{- with .extraEnv }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* The token that gateway and operator show to engines. The kubelet renews the file. */}}
{{- define "motet.engineTokenVolume" -}}
- name: engine-token
  projected:
    sources:
      - serviceAccountToken:
          audience: motet-engine
          expirationSeconds: 3600
          path: token
{{- end -}}

{{- define "motet.engineTokenMount" -}}
- name: engine-token
  mountPath: /var/run/secrets/motet.dev/engine
  readOnly: true
{{- end -}}
